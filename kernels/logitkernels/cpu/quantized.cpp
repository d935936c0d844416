#include "quantized.h"

#include "block_multiply.h"

namespace logitkernels {

void multiply_quantized(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo,
                        Epilogue epilogue) {
    if (is_fma_of_blocks(linear.kind)) return multiply_quantized_fma(linear, x, rows, out, ldo, epilogue);
    with_format(block_type(linear.kind), [&]<class Format>() {
        using Dot = DotOf<typename Format::Integers>;
        multiply_panels<Dot, Format::Scales::parts>(Format::integers, layout_of<Format>(linear.k / kBlock), linear, x, rows,
                                                    out, ldo, epilogue);
    });
}

}  // namespace logitkernels
