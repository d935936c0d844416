#include "quantized.h"

#include "block_multiply.h"

namespace logitkernels {

void multiply_quantized_fma(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo,
                            Epilogue epilogue) {
    with_format(block_type(linear.kind), [&]<class Format>() {
        multiply_panels<Fma, Format::Scales::parts>(Format::integers, layout_of<Format>(linear.k / kBlock), linear, x, rows,
                                                    out, ldo, epilogue);
    });
}

}  // namespace logitkernels
