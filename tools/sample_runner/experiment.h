#pragma once

#include <optional>
#include <string>
#include <vector>

#include "codec_check.h"
#include "compare.h"
#include "decode_step.h"
#include "device_memory.h"
#include "options.h"
#include "problem.h"

namespace sample_runner {

enum class Status : uint8_t { kUnchecked, kRight, kMismatch, kUnsupported };

struct CacheSize {
  int64_t num_bytes = 0, num_bytes_as_fp16 = 0;
  int64_t num_bytes_read = 0;  // by one decode step: the live tokens that some query sees
  double bits_per_element = 0;
};

// Everything that one format's run found out. Members stay empty where the run did not get that far.
struct Outcome {
  Status status = Status::kUnchecked;
  std::vector<std::string> messages;  // why a run is unsupported or a mismatch
  std::string k_scale, v_scale;       // granularity
  std::optional<CacheSize> size;
  std::optional<DecodeResult> decode;
  std::optional<Comparison> comparison;        // with the reference over the dequantised cache: the kernel's error
  std::optional<CodecCheck> k_codec, v_codec;  // not for loaded codes
  std::optional<double> output_format_error;   // relative L2 between the references over dequantised and original K and V
};

// Fills a cache of one format, decodes, measures and checks. Throws what the library throws.
Outcome run_experiment(const Problem& problem, quantattn::KvPair format, const Options& options, DeviceMemory& memory);

double tolerance_of(const Options& options);

}  // namespace sample_runner
