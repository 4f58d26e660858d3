#pragma once

namespace quantattn::cpu {

// Runs task(data) on several threads of the OpenMP runtime that this process has loaded, the caller among them, and returns
// when all are done; `num_threads` is how many the task can use, and at least one runs it. False, and nothing has run, where
// there is no such runtime or its threads did not survive a fork.
//
// torch brings a runtime whose threads keep spinning for milliseconds after each of its operations. Threads of our own would
// share the cores with them: a call right after an operation would take several times as long.
bool run_on_openmp_team(int num_threads, void (*task)(void*), void* data);

}  // namespace quantattn::cpu
