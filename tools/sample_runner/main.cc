#include <iostream>

#include "quantattn/quantattn.h"

int main() {
  std::cout << "quantattn " << quantattn::version() << '\n';
  for (const quantattn::BackendInfo& backend : quantattn::built_backends())
    std::cout << "backend " << backend.name << ": " << backend.num_devices << " devices; " << backend.status << '\n';
  for (const quantattn::KernelInfo& kernel : quantattn::built_decode_kernels())
    std::cout << "decode " << kernel.backend << ' ' << kernel.variant << ' ' << quantattn::name(kernel.format) << " head_dim "
              << kernel.min_head_dim << ".." << kernel.max_head_dim << " step " << kernel.head_dim_multiple
              << (kernel.runs_here ? "" : " (not on this machine)") << '\n';
  return 0;
}
