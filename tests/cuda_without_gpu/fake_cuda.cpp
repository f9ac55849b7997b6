// A CUDA backend that does nothing: a device guard, streams and events without effect, and hooks
// that say there is one device. With it a CPU build of PyTorch runs autograd on fake CUDA tensors,
// which have shapes, types and a device but no memory. fake_cuda.py builds and loads it.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using namespace c10;
constexpr auto DEFAULT = Stream::DEFAULT;
const Device device0(DeviceType::CUDA, 0);

struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
    Device exchangeDevice(Device) const override { return device0; }
    Device getDevice() const override { return device0; }
    Stream getStream(Device) const noexcept override { return Stream(DEFAULT, device0); }
    Stream getNewStream(Device, int) const override { return Stream(DEFAULT, device0); }
    Stream exchangeStream(Stream) const noexcept override { return Stream(DEFAULT, device0); }
    void record(void **, const Stream &, const DeviceIndex, const EventFlag) const override {}
    void block(void *, const Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks : at::CUDAHooksInterface { // PyTorch asks for it by this name
    explicit CUDAHooks(at::CUDAHooksArgs) {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    void init() const override {}
    int getNumGPUs() const override { return 1; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    DeviceIndex current_device() const override { return 0; }
};

} // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}
