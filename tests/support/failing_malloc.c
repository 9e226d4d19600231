/* Memory that runs out on demand: the C library's allocation functions, of which one call fails when told to.
   Preloaded into a process of its own by `faults.py`; needs glibc. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static int counts = 0;
static long seen = 0, failing = -1;
static size_t from_size = 0;

/* Let allocation `number` from now on fail, among those of at least `size` bytes. */
void fail_allocation(long number, size_t size) {
    seen = 0;
    failing = number;
    from_size = size;
    counts = 1;
}

/* How many allocations there were since. */
long stop_failing(void) {
    counts = 0;
    return seen;
}

static int fails(size_t size) {
    if (!counts || size < from_size || seen++ != failing)
        return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) { return fails(size) ? NULL : __libc_malloc(size); }

void *calloc(size_t n, size_t size) { return fails(n * size) ? NULL : __libc_calloc(n, size); }

void *realloc(void *memory, size_t size) { return fails(size) ? NULL : __libc_realloc(memory, size); }

void *memalign(size_t alignment, size_t size) { return fails(size) ? NULL : __libc_memalign(alignment, size); }

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **memory, size_t alignment, size_t size) {
    *memory = memalign(alignment, size);
    return *memory == NULL ? ENOMEM : 0;
}

void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
    return fails(size) ? MAP_FAILED : (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
}

void *mmap64(void *address, size_t size, int protection, int flags, int file, off_t offset) {
    return mmap(address, size, protection, flags, file, offset);
}
