// The weight formats: a new one is a struct in a file of its own, a name in mlp.h, a line in the list here,
// and in mlp_operands.h the check of its tensors.
#pragma once
#include "format_int4.h"
#include "format_int8.h"
#include "format_panels.h"
#include "format_rows.h"
#include "mlp_backward.h"
#include "mlp_forward.h"

template <class M, class Body> static inline void with_format(int64_t name, Body body) {
    switch (name) {
        case PLAIN: return body.template operator()<PlainRows<M>>();
        case PANELS: return body.template operator()<PackedPanels<M>>();
        case INT8: return body.template operator()<Int8>();
        case INT4: return body.template operator()<Int4>();
    }
}

template <class M> struct MLPForwardPass {
    const MLPForward& a;

    void run() const {
        with_format<M>(a.sizes.format,
                       [&]<class Format>() { ForwardPass<typename Format::template Forward<M>>(a).run(); });
    }
};

template <class M> struct MLPBackwardPass {
    const MLPBackward& a;

    void run() const {
        with_format<M>(a.sizes.format, [&]<class Format>() {
            if constexpr (Format::HAS_BACKWARD) BackwardPass<M, Format>(a).run();
        });
    }
};
