/* The floating-point control words under which a step runs, whatever the caller has set: round to nearest, no
 * traps; in kernels, subnormals are also read as zero and flushed to zero.
 */
#ifndef FASTOPT_CONTROL_WORD_H
#define FASTOPT_CONTROL_WORD_H

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
typedef unsigned int control_word;
/* All exceptions masked (0x1f80), flush to zero (0x8000), denormals are zero (0x0040). */
static inline control_word enter_kernels(void) {
    control_word caller = _mm_getcsr();
    _mm_setcsr(0x9fc0);
    return caller;
}
static inline control_word enter_host(void) {
    control_word caller = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return caller;
}
static inline void leave_kernels(control_word caller) { _mm_setcsr(caller); }
static inline control_word read_control_word(void) { return _mm_getcsr(); }

#elif defined(__aarch64__) && defined(__GNUC__)
typedef unsigned long long control_word;
static inline control_word read_control_word(void) {
    control_word now;
    __asm__ volatile("mrs %0, fpcr" : "=r"(now));
    return now;
}
static inline void leave_kernels(control_word caller) { __asm__ volatile("msr fpcr, %0" : : "r"(caller)); }
/* FZ (bit 24) flushes subnormal operands and results. */
static inline control_word enter_kernels(void) {
    control_word caller = read_control_word();
    leave_kernels(1ull << 24);
    return caller;
}
static inline control_word enter_host(void) {
    control_word caller = read_control_word();
    leave_kernels(0);
    return caller;
}

#else
typedef int control_word;
static inline control_word enter_kernels(void) { return 0; }
static inline control_word enter_host(void) { return 0; }
static inline void leave_kernels(control_word caller) { (void)caller; }
static inline control_word read_control_word(void) { return 0; }
#endif

#endif
