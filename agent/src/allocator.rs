//! How the C library keeps memory that was given back.
//!
//! glibc takes buffers of 128 KiB and more from the system, and returns them to it when they are freed, until the first large one
//! is freed: then it raises that size, up to 32 MiB, and keeps what is below it in heaps, one for each thread. Packs and their
//! parts come and go in buffers of many sizes, allocated by one thread and freed by another, so that those heaps
//! become several times what is in use. A fixed size keeps all large buffers out of them.

/// Buffers of so many bytes and more go back to the system when they are freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BELOW_BYTES: libc::c_int = 1 << 20;

/// To be called once, before threads are started. Does nothing where the C library is another.
#[allow(unsafe_code)]
pub fn keep_no_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it sets a number in the allocator, which takes its own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BELOW_BYTES);
    }
}
