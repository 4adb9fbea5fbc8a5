//! Where compression, encryption and hashing run: never on the reactor.

use crate::{Error, Kind, Result};
use std::sync::OnceLock;

/// The pool of this process, with one thread for each core.
pub fn pool() -> &'static rayon::ThreadPool {
    static POOL: OnceLock<rayon::ThreadPool> = OnceLock::new();
    POOL.get_or_init(|| make("codec", 0))
}

/// For work that also waits for a disk: two threads for each core, so that one computes while the other waits.
pub fn disk_pool() -> &'static rayon::ThreadPool {
    static POOL: OnceLock<rayon::ThreadPool> = OnceLock::new();
    POOL.get_or_init(|| make("disk", 2 * pool().current_num_threads()))
}

/// `threads` is 0 for as many as there are cores.
fn make(name: &'static str, threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(move |number| format!("{name}-{number}"))
        .build()
        .expect("the operating system has threads")
}

/// Runs `work` on the pool. Not cancelled when the future is dropped: the work still runs to its end.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    run_on(pool(), work).await
}

/// The same for work that also waits for a disk.
pub async fn run_on_disk<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    run_on(disk_pool(), work).await
}

async fn run_on<T: Send + 'static>(
    pool: &'static rayon::ThreadPool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (send, receive) = tokio::sync::oneshot::channel();
    pool.spawn(move || {
        // The receiver is gone only if nobody wants the result any more.
        let _ = send.send(work());
    });
    receive.await.map_err(|_| Error::new(Kind::Bug, "work on the codec pool panicked"))
}
