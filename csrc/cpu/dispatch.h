// The instance of the kernels for the instructions that this machine has.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace hubert_fast {

// The fastest that runs here, unless `select` or the environment variable HUBERT_FAST_INSTRUCTION_SET chose another.
const Kernels& selected();

// Throws std::invalid_argument if there is no such instance or this machine cannot run it.
void select(const std::string& name);

// Names of the instances that this machine can run, fastest first.
std::vector<std::string> available();

}  // namespace hubert_fast
