// The library across fork(): the child has one thread, and nothing that the parent's other threads did will
// ever end there.
#pragma once
#include <cstdint>
#include <pthread.h>
#include <system_error>
#include <thread>

// The thread that called fork() goes on in the child. gcc's OpenMP runtime takes it to have the workers that
// it had in the parent, and waits for them for ever. A new thread has no workers yet, so the runtime starts
// some.
class __attribute__((visibility("hidden"))) Fork {
    inline static pthread_t survivor;
    inline static bool happened = false;

    static void in_child() {
        survivor = pthread_self();
        happened = true;
    }

  public:
    // Called once, when the library is loaded.
    static void watch() { pthread_atfork(nullptr, nullptr, in_child); }
    // True in a child, on the thread that came over from the parent.
    static bool is_survivor() { return happened && pthread_equal(pthread_self(), survivor); }
};

// pass(), which must not throw and whose parallel regions are of so many threads, on a thread that may start
// OpenMP's workers.
template <class Pass> static inline int with_workers(int64_t& threads, Pass pass) {
    if (threads == 1 || !Fork::is_survivor()) return pass();
    int result = 0;
    try {
        std::thread([&] { result = pass(); }).join();
    } catch (const std::system_error&) {  // no new thread can be had
        threads = 1;
        result = pass();
    }
    return result;
}
