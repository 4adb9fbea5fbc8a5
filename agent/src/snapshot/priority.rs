//! The priority of the threads that read files: a thread's own, for its disk and for its processor time.
//!
//! Disk priorities count where the block device's scheduler knows them (BFQ, and mq-deadline in part).

use backstay_common::config::Priority;
use std::io;

/// ioprio_set(2): "who" is one thread, and 0 is the calling one.
const WHO_PROCESS: libc::c_int = 1;
const CLASS_SHIFT: u32 = 13;
const CLASS_BEST_EFFORT: libc::c_int = 2;
const CLASS_IDLE: libc::c_int = 3;
const BEST_EFFORT_LOWEST: libc::c_int = 7;

/// Gives the calling thread its priority; it may not come back to a higher one. A kernel that refuses is told of in the log.
pub fn take(priority: Priority) {
    let (io, nice) = match priority {
        Priority::Normal => return,
        Priority::Low => (CLASS_BEST_EFFORT << CLASS_SHIFT | BEST_EFFORT_LOWEST, 10),
        Priority::Idle => (CLASS_IDLE << CLASS_SHIFT, 19),
    };
    if let Err(error) = set_io(io) {
        tracing::debug!("the disk priority stays as it is: {error}");
    }
    // Of a thread, on Linux, where PRIO_PROCESS names one. Never raised.
    let now = rustix::process::getpriority_process(None).unwrap_or(0);
    if now < nice
        && let Err(error) = rustix::process::setpriority_process(None, nice)
    {
        tracing::debug!("the processor priority stays as it is: {error}");
    }
}

#[allow(unsafe_code)]
fn set_io(priority: libc::c_int) -> io::Result<()> {
    // SAFETY: three integers, and no memory.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(unsafe_code)]
    fn now() -> (libc::c_long, i32) {
        // SAFETY: two integers, and no memory.
        let io = unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) };
        (io, rustix::process::getpriority_process(None).unwrap())
    }

    #[test]
    fn a_thread_steps_back_and_the_others_do_not() {
        let before = now();
        let after = |priority| {
            let thread = std::thread::spawn(move || {
                take(priority);
                now()
            });
            thread.join().unwrap()
        };
        assert_eq!(after(Priority::Normal), before);
        assert_eq!(after(Priority::Low), (2 << 13 | 7, before.1.max(10)));
        assert_eq!(after(Priority::Idle), (3 << 13, 19));
        assert_eq!(now(), before);
    }
}
