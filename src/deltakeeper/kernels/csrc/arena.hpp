// Memory for planes in pages of 2 MiB where the system gives them: a product of many tenants reads a little here and a little
// there, and with small pages it waits for their addresses as long as for the bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace deltakeeper {

// Zeroed, at a multiple of 64 bytes; freed with the last copy. Blocks that one thread asks for in a row share large pages,
// which go back to the system when all of them are freed.
std::shared_ptr<uint32_t> allocate_words(std::size_t count);

}  // namespace deltakeeper
