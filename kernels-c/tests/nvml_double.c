/* A double of the NVIDIA driver's library for the tests of src/nvml.rs: two devices, and what a
 * test asks for by a macro.
 *
 *   NOTHING    no function at all
 *   COUNT      how many devices it claims
 *   FAIL_AT=n  the nth call below fails; those of a device for the second one only
 *   RUDE       texts without an end, and more memory in use than there is
 */
#ifndef NOTHING

#include <string.h>

#ifndef COUNT
#define COUNT 2
#endif
#ifndef FAIL_AT
#define FAIL_AT 0
#endif

struct memory {
    unsigned long long total, left, used;
};

static const struct device {
    const char *name, *uuid;
    unsigned long long total_mib, used_mib;
    int major, minor;
} DEVICES[2] = {
    {"Double 24", "GPU-00000000-aaaa", 24576, 1024, 8, 9},
    {"Double 80", "GPU-11111111-bbbb", 81920, 512, 9, 0},
};

static int is_open;

/* 999 is what NVML calls unknown: a call while it is not initialised. */
static int at(int call, const struct device *device)
{
    if (!is_open) {
        return 999;
    }
    return call == FAIL_AT && (device == NULL || device == &DEVICES[1]) ? 18 : 0;
}

int nvmlInit_v2(void)
{
    is_open++;
    return at(1, NULL);
}

int nvmlShutdown(void)
{
    is_open--;
    return 0;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    *count = COUNT;
    return at(2, NULL);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, const struct device **device)
{
    *device = &DEVICES[index % 2];
    return at(3, *device);
}

static int text(int call, const struct device *device, const char *from, char *to, unsigned room)
{
#ifdef RUDE
    memset(to, 'x', room);
    (void)from;
#else
    strncpy(to, from, room);
#endif
    return at(call, device);
}

int nvmlDeviceGetName(const struct device *device, char *name, unsigned room)
{
    return text(4, device, device->name, name, room);
}

int nvmlDeviceGetUUID(const struct device *device, char *uuid, unsigned room)
{
    return text(5, device, device->uuid, uuid, room);
}

int nvmlDeviceGetMemoryInfo(const struct device *device, struct memory *memory)
{
    memory->total = device->total_mib << 20;
    memory->used = device->used_mib << 20;
#ifdef RUDE
    memory->used = memory->total + 1;
#endif
    memory->left = memory->total - memory->used;
    return at(6, device);
}

int nvmlDeviceGetCudaComputeCapability(const struct device *device, int *major, int *minor)
{
    *major = device->major;
    *minor = device->minor;
    return at(7, device);
}

const char *nvmlErrorString(int code)
{
    return code == 18 ? "Double trouble" : "Unknown";
}

#endif
