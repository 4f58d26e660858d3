#pragma once

#include <optional>
#include <string>
#include <vector>

#include "attention_run.h"
#include "codec_check.h"
#include "compare.h"
#include "device_memory.h"
#include "options.h"
#include "problem.h"

namespace sample_runner {

enum class Status : uint8_t { kUnchecked, kRight, kMismatch, kUnsupported };

struct CacheSize {
  int64_t num_bytes = 0, num_bytes_as_fp16 = 0;
  double bits_per_element = 0;
};

// What a call must do for some sequences.
struct Work {
  int64_t num_sequences = 0;
  int64_t num_bytes_read = 0;  // of K and V: the tokens that some query sees
  int64_t num_flop = 0;        // two for each product of q and K or of p and V, masked scores not counted
};

// Everything that one format's run found out. Members stay empty where the run did not get that far.
struct Outcome {
  Status status = Status::kUnchecked;
  std::vector<std::string> messages;  // why a run is unsupported or a mismatch
  std::string k_scale, v_scale;       // granularity
  std::optional<CacheSize> size;      // not for fresh K and V
  std::optional<AttentionResult> attention;
  Work work, prefill_work, decode_work;        // of all sequences, and of those of a hybrid batch that prefill or decode
  std::optional<Comparison> comparison;        // with the reference over the numbers that the kernel was given: its own error
  std::optional<CodecCheck> k_codec, v_codec;  // not for loaded codes and not for fresh K and V
  std::optional<double> output_format_error;   // relative L2 between the references over dequantised and original K and V
};

// Gives K and V to the device in one form, runs attention, measures and checks. Throws what the library throws.
Outcome run_experiment(const Problem& problem, KvSource source, const Options& options, DeviceMemory& memory);

double tolerance_of(const Options& options);

}  // namespace sample_runner
