#include "allocmoe-cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Of less memory page tables cost next to nothing, and a virtual machine may take milliseconds to come by a large page.
static const size_t least = 256u << 20;

// Of 2 MB, which is what x86-64 and most Arm kernels have for large ones. Systems set to "madvise", as Debian and Ubuntu are, give
// them to who asks. Where they have none to give, pages stay small, as they are without asking.
void allocmoe_ask_for_large_pages(void * data, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page  = 2u << 20;
    const uintptr_t first = ((uintptr_t) data + page - 1) / page * page;
    const uintptr_t last  = ((uintptr_t) data + size) / page * page;
    if (size >= least) {
        madvise((void *) first, last - first, MADV_HUGEPAGE);
    }
#else
    (void) data;
    (void) size;
#endif
}
