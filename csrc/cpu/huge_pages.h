// Advice to the operating system about fresh memory.
#pragma once

#include <cstdint>

namespace hubert_fast {

// Asks for huge pages under memory that has not been touched yet. The first write to a fresh page costs a fault, and with pages of
// 4 KiB the faults of a large tensor take longer than the pass that fills it. It is advice: where it is not taken, nothing changes.
void advise_huge_pages(void* address, std::int64_t bytes);

}  // namespace hubert_fast
