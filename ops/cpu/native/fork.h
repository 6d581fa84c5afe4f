// The library after fork(): the child has one thread, and work that the parent's other threads had begun
// never ends there.
#pragma once
#include <cstdint>
#include <pthread.h>
#include <system_error>
#include <thread>

// The thread that called fork() goes on in the child. gcc's OpenMP runtime assumes that this thread still has
// the parent's workers, and waits for them for ever. A new thread has no workers, so the runtime starts some.
class __attribute__((visibility("hidden"))) Fork {
    inline static pthread_t survivor;
    inline static bool happened = false;

    static void in_child() {
        survivor = pthread_self();
        happened = true;
    }

  public:
    // Call it once, when the library is loaded.
    static void watch() { pthread_atfork(nullptr, nullptr, in_child); }
    // True in a child, on the thread that called fork().
    static bool is_survivor() { return happened && pthread_equal(pthread_self(), survivor); }
};

// Runs pass() on a thread that may start OpenMP's workers. pass() must not throw; its parallel regions have
// `threads` threads.
template <class Pass> static inline int with_workers(int64_t& threads, Pass pass) {
    if (threads == 1 || !Fork::is_survivor()) return pass();
    int result = 0;
    try {
        std::thread([&] { result = pass(); }).join();
    } catch (const std::system_error&) {  // the system has no new thread
        threads = 1;
        result = pass();
    }
    return result;
}
