# Memory ranges of arrays, sorted: who overlaps whom. Part of engine.pyx.
# What an overlap means, and how it is refused, is decided in Python (fastopt/_core).


cdef struct Range:
    uintptr_t first
    uintptr_t end
    Py_ssize_t owner


cdef int compare_ranges(const void* a, const void* b) noexcept nogil:
    cdef uintptr_t x = (<Range*>a).first
    cdef uintptr_t y = (<Range*>b).first
    return (x > y) - (x < y)


cdef class Ranges:
    """Sorted memory ranges of arrays, empty ones left out: finds overlaps in O(log n).

    Parameters
    ----------
    arrays
        Arrays, and None, which counts for nothing.
    gap : int
        Arrays that follow each other in this list and in memory become one range, with so many bytes between them at
        most where they are of one allocation. -1 keeps every array apart.
    """

    cdef Range* ranges
    cdef Py_ssize_t n

    def __cinit__(self, list arrays, int gap=-1):
        cdef Py_ssize_t i
        cdef cnp.ndarray array
        cdef Range* last = NULL
        cdef PyObject* allocation = NULL
        cdef uintptr_t first
        self.ranges = <Range*>calloc(len(arrays) + 1, sizeof(Range))
        if self.ranges == NULL:
            raise MemoryError
        for i in range(len(arrays)):
            array = arrays[i]
            if array is None or not cnp.PyArray_SIZE(array):
                continue
            first = <uintptr_t>cnp.PyArray_DATA(array)
            if gap >= 0 and last != NULL and (
                first == last.end
                or (allocation == cnp.PyArray_BASE(array) and last.end < first <= last.end + <uintptr_t>gap)
            ):
                last.end = first + <uintptr_t>cnp.PyArray_NBYTES(array)
                continue
            last = &self.ranges[self.n]
            last.first = first
            last.end = first + <uintptr_t>cnp.PyArray_NBYTES(array)
            last.owner = i
            allocation = cnp.PyArray_BASE(array)
            self.n += 1
        qsort(self.ranges, self.n, sizeof(Range), compare_ranges)

    def plus(self, Ranges others):
        """The ranges of both, in a new object."""
        cdef Ranges made = Ranges.__new__(Ranges, [])
        cdef Py_ssize_t i = 0, k, run, room = 64
        cdef Range* ranges
        while room < self.n + others.n:
            room *= 2  # sizes that come again: a larger block every time would come from the system, page by page
        ranges = <Range*>malloc(room * sizeof(Range))
        if ranges == NULL:
            raise MemoryError
        free(made.ranges)
        made.ranges = ranges
        made.n = self.n + others.n
        for k in range(others.n):  # often few: what lies between two of them is copied at once
            run = self.first_after(others.ranges[k].first, i) - i
            memcpy(ranges + i + k, self.ranges + i, run * sizeof(Range))
            i += run
            ranges[i + k] = others.ranges[k]
        memcpy(ranges + i + others.n, self.ranges + i, (self.n - i) * sizeof(Range))
        return made

    cdef Py_ssize_t first_after(self, uintptr_t address, Py_ssize_t start) noexcept:
        """The first range from `start` on that begins behind `address`."""
        cdef Py_ssize_t end = self.n, middle
        while start < end:
            middle = (start + end) // 2
            if self.ranges[middle].first <= address:
                start = middle + 1
            else:
                end = middle
        return start

    def __dealloc__(self):
        free(self.ranges)

    def first_overlap(self):
        """Positions of two arrays that overlap each other, or None."""
        cdef Py_ssize_t k
        for k in range(1, self.n):
            if self.ranges[k].first < self.ranges[k - 1].end:
                return tuple(sorted((self.ranges[k - 1].owner, self.ranges[k].owner)))
        return None

    def overlapping(self, list arrays):
        """Positions of the arrays that overlap one of the ranges, which must not overlap each other."""
        cdef Py_ssize_t k
        cdef cnp.ndarray array
        cdef list found = []
        for k in range(len(arrays)):
            array = arrays[k]
            first = <uintptr_t>cnp.PyArray_DATA(array)
            if self.find(first, first + <uintptr_t>cnp.PyArray_NBYTES(array)) >= 0:
                found.append(k)
        return found

    cdef Py_ssize_t find(self, uintptr_t first, uintptr_t end) noexcept nogil:
        """Position of an array that overlaps [first, end), or -1. The ranges must not overlap each other."""
        cdef Py_ssize_t low = 0
        cdef Py_ssize_t high = self.n
        cdef Py_ssize_t middle
        if first == end:
            return -1
        while low < high:  # the first range that ends after `first`
            middle = (low + high) // 2
            if self.ranges[middle].end <= first:
                low = middle + 1
            else:
                high = middle
        if low < self.n and self.ranges[low].first < end:
            return self.ranges[low].owner
        return -1
