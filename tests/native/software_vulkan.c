// For LD_PRELOAD, what the tests need of Mesa's software device:
//
// - Buffers are never destroyed, and memory never freed. Version 22.3 looks at every binding of a descriptor set, also at those
//   that no shader reads and whose buffers are gone, and spoils the heap.
// - New memory is full of NaN, so that nothing rests on zeros that a system happens to hand out.
// - With ALLOCMOE_TEST_INTEGER_DOT set it says that its dot products of integers are fast: llama.cpp takes them only then.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <vulkan/vulkan.h>

typedef PFN_vkVoidFunction (*getter)(void * handle, const char * name);

// a library that a program opens later is in no scope that dlsym could go through
static PFN_vkVoidFunction find(const char * symbol, void * handle, const char * name) {
    const getter found = (getter) dlsym(dlopen("libvulkan.so.1", RTLD_LAZY), symbol);
    return found(handle, name);
}

static void keep(void * device, void * handle, const void * allocator) {
    (void) device;
    (void) handle;
    (void) allocator;
}

static VkResult allocate(VkDevice device, const VkMemoryAllocateInfo * asked, const VkAllocationCallbacks * callbacks,
    VkDeviceMemory * memory) {
    const VkResult result = ((PFN_vkAllocateMemory) find("vkGetDeviceProcAddr", device, "vkAllocateMemory"))(device, asked,
        callbacks, memory);
    for (const VkBaseInStructure * next = asked->pNext; next; next = next->pNext) {
        if (next->sType == VK_STRUCTURE_TYPE_IMPORT_MEMORY_HOST_POINTER_INFO_EXT) {
            return result; // somebody's numbers are in it
        }
    }
    void * begin = NULL;
    if (result == VK_SUCCESS && ((PFN_vkMapMemory) find("vkGetDeviceProcAddr", device, "vkMapMemory"))(
                                    device, *memory, 0, VK_WHOLE_SIZE, 0, &begin) == VK_SUCCESS) {
        memset(begin, 0xff, asked->allocationSize);
        ((PFN_vkUnmapMemory) find("vkGetDeviceProcAddr", device, "vkUnmapMemory"))(device, *memory);
    }
    return result;
}

static VkInstance last_instance;

static void properties(VkPhysicalDevice device, VkPhysicalDeviceProperties2 * found) {
    ((PFN_vkGetPhysicalDeviceProperties2) find("vkGetInstanceProcAddr", last_instance, "vkGetPhysicalDeviceProperties2"))(
        device, found);
    for (VkBaseOutStructure * next = found->pNext; next; next = next->pNext) {
        if (next->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_PROPERTIES) {
            ((VkPhysicalDeviceShaderIntegerDotProductProperties *) next)->integerDotProduct4x8BitPackedSignedAccelerated = VK_TRUE;
        }
    }
}

static PFN_vkVoidFunction get(const char * symbol, void * handle, const char * name) {
    if (strcmp(name, "vkDestroyBuffer") == 0 || strcmp(name, "vkFreeMemory") == 0) {
        return (PFN_vkVoidFunction) keep;
    }
    if (strcmp(name, "vkAllocateMemory") == 0) {
        return (PFN_vkVoidFunction) allocate;
    }
    if (strcmp(name, "vkGetPhysicalDeviceProperties2") == 0 && getenv("ALLOCMOE_TEST_INTEGER_DOT")) {
        last_instance = handle;
        return (PFN_vkVoidFunction) properties;
    }
    if (strcmp(name, "vkGetInstanceProcAddr") == 0) {
        return (PFN_vkVoidFunction) vkGetInstanceProcAddr;
    }
    if (strcmp(name, "vkGetDeviceProcAddr") == 0) {
        return (PFN_vkVoidFunction) vkGetDeviceProcAddr;
    }
    return find(symbol, handle, name);
}

PFN_vkVoidFunction vkGetInstanceProcAddr(VkInstance instance, const char * name) {
    return get("vkGetInstanceProcAddr", instance, name);
}

PFN_vkVoidFunction vkGetDeviceProcAddr(VkDevice device, const char * name) {
    return get("vkGetDeviceProcAddr", device, name);
}
