#include "quantized.h"

#include "block_multiply.h"

namespace logitkernels {

std::unique_ptr<PartProduct> quantized_fma_product(const PartTask& task) {
    std::unique_ptr<PartProduct> product;
    with_format(block_type(task.part.kind), [&]<class Format>() { product = block_product<Fma, Format>(task); });
    return product;
}

}  // namespace logitkernels
