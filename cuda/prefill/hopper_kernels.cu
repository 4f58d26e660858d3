#include <array>

#include "formats/bf16.h"
#include "formats/fp16.h"
#include "formats/fp8_e4m3.h"
#include "formats/fp8_e5m2.h"
#include "formats/int8.h"
#include "prefill/hopper_instances.h"
#include "prefill/hopper_kernel.cuh"

// Compiled for sm_90a alone. A new head_dim is one line here.
namespace quantattn::cuda {
namespace {

template <class Format, int kHeadDim>
constexpr HopperInstance instance() {
  using Shape = HopperShape<Format, kHeadDim>;
  return {kHeadDim,
          Shape::kBlockRows,
          Shape::kKeys,
          Shape::kBoxColumns,
          Shape::kBoxRowBytes,
          Shape::kThreads,
          HopperMemory<Shape>::kBytes,
          &hopper_prefill_kernel<Shape>};
}

template <class Format>
constexpr std::array kInstances = {instance<Format, 64>(), instance<Format, 128>(), instance<Format, 256>()};

}  // namespace

std::span<const HopperInstance> hopper_instances(KvFormat format) {
  if (format == KvFormat::kFp16) return kInstances<formats::Fp16>;
  if (format == KvFormat::kBf16) return kInstances<formats::Bf16>;
  if (format == KvFormat::kInt8) return kInstances<formats::Int8>;
  if (format == KvFormat::kFp8E4M3) return kInstances<formats::Fp8E4M3>;
  if (format == KvFormat::kFp8E5M2) return kInstances<formats::Fp8E5M2>;
  return {};
}

}  // namespace quantattn::cuda
