#include "quantized.h"

#include "block_multiply.h"

namespace logitkernels {

std::unique_ptr<PartProduct> quantized_product(const PartTask& task) {
    if (is_fma_of_blocks(task.part.kind)) return quantized_fma_product(task);
    std::unique_ptr<PartProduct> product;
    with_format(block_type(task.part.kind), [&]<class Format>() {
        using Integers = typename Format::Integers;
        product = block_product<DotOf<Integers>, Format>(task);
    });
    return product;
}

}  // namespace logitkernels
