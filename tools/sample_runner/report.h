#pragma once

#include <iosfwd>

#include "experiment.h"

namespace sample_runner {

// Writes one record for each experiment: text blocks, CSV rows under one header, or a JSON array.
class ReportWriter {
 public:
  ReportWriter(std::ostream& stream, ReportFormat format) : stream_(stream), format_(format) {}
  void write(const Problem& problem, KvSource source, const Options& options, const Outcome& outcome);
  void finish();

 private:
  std::ostream& stream_;
  ReportFormat format_;
  int num_written_ = 0;
};

}  // namespace sample_runner
