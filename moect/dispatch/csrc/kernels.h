// The CUDA kernels, written as functions of (phase, block, thread), so that a CPU can run the very same code.
//
// A kernel is a struct: its members are its arguments, `threads` its block size, `Shared` what the threads of a block
// share. All threads of a block finish a phase before any begins the next. A GPU runs blocks side by side (kernels.cu);
// the CPU build runs them in a loop (cpu_kernels.cpp).
//
// Nothing is added atomically and every sum has a fixed order: same input, same bits.
//
// T tokens, K experts per token, E experts, D width, F expert width, N = T K assignments, i = t K + k is an assignment,
// n its position in the order of the experts.
//
// A key outside [0, E) is sorted behind all experts. Its position and, there, its source are stored as complements
// (~n, ~i: negative): permute writes zeros there, and whatever that token would get from it is NaN, never garbage.
#pragma once

#include "row_kernels.h"
#include "sort_kernels.h"
