// libstdc++'s shared_ptr asks glibc 2.32 and later whether the process has one thread alone, to count
// without atomics. This answer, no, is of this library alone: it loads with older glibc as well.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
