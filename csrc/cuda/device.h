#pragma once

namespace ssp {

// What the launch heuristics know of a GPU.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block may ask for
  bool cooperative;  // whether grid-wide barriers are to be used
};

}  // namespace ssp
