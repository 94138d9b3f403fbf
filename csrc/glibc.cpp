// Lets a library that was linked on a newer Linux load on one with glibc 2.28.
#ifdef __GLIBC__
#error "include nothing here: the declarations of glibc would clash with those below"
#endif

// libstdc++ reads this flag of glibc 2.32 to count references without atomics in a process of one
// thread. This library has its own, which says that there may be more.
extern "C" {
[[gnu::visibility("hidden")]] char __libc_single_threaded = 0;
}

// glibc 2.34 moved these from libpthread, libdl and librt into libc, and gave them a new version in
// which nothing else changed. The static CUDA runtime calls them: each call jumps to the version
// that older systems have too, in libraries that PyTorch's own need and so load there.
#if defined(SG_KERNELS_STATIC_CUDART) && defined(__x86_64__)
asm(R"(
.macro forward name, version=GLIBC_2.2.5
  .symver older_\name, \name@\version
  .text
  .globl \name
  .hidden \name
  .type \name, @function
\name:
  jmp *older_\name@GOTPCREL(%rip)
  .size \name, . - \name
.endm
.irp name, dlclose, dlerror, dlopen, dlsym, dlvsym
  forward \name
.endr
forward dlmopen, GLIBC_2.3.4
.irp name, create, detach, getspecific, join, key_create, key_delete, kill, once, setspecific
  forward pthread_\name
.endr
.irp name, condattr_setpshared, mutex_trylock, mutexattr_destroy, mutexattr_init
  forward pthread_\name
.endr
.irp name, mutexattr_setpshared, mutexattr_settype
  forward pthread_\name
.endr
.irp name, destroy, init, rdlock, timedrdlock, timedwrlock, tryrdlock, trywrlock, unlock, wrlock
  forward pthread_rwlock_\name
.endr
.irp name, destroy, init, setpshared
  forward pthread_rwlockattr_\name
.endr
.irp name, destroy, init, lock, trylock, unlock
  forward pthread_spin_\name
.endr
.irp name, destroy, init, post, timedwait, trywait, wait
  forward sem_\name
.endr
.irp name, open, unlink
  forward shm_\name
.endr
)");
#endif
