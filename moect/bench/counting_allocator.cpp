// PyTorch's CPU allocator with a count: the bytes that are alive, on any thread, since count_begin, and their peak.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace {

std::mutex mutex;
std::unordered_map<void*, int64_t> sizes;  // of what was allocated since count_begin and is alive
int64_t alive = 0, peak = 0;
c10::Allocator* usual = nullptr;

void release(void* data) {
  if (data == nullptr) return;
  {
    std::lock_guard<std::mutex> guard(mutex);
    // a tensor of an earlier count may be freed in this one: it is no longer known, and takes nothing off
    if (auto found = sizes.find(data); found != sizes.end()) {
      alive -= found->second;
      sizes.erase(found);
    }
  }
  c10::free_cpu(data);
}

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : c10::alloc_cpu(bytes);
    if (data != nullptr) {
      std::lock_guard<std::mutex> guard(mutex);
      sizes[data] = static_cast<int64_t>(bytes);
      alive += static_cast<int64_t>(bytes);
      peak = std::max(peak, alive);
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Counting counting;

}  // namespace

extern "C" void count_begin() {
  {
    std::lock_guard<std::mutex> guard(mutex);
    sizes.clear();
    alive = peak = 0;
  }
  usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&counting);
}

extern "C" int64_t count_end() {
  c10::SetCPUAllocator(usual);
  std::lock_guard<std::mutex> guard(mutex);
  return peak;
}
