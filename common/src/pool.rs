//! Where compression, encryption and hashing run: never on the reactor.

use crate::{Error, Kind, Result};
use std::sync::OnceLock;

/// The pool of this process, with one thread for each core.
pub fn pool() -> &'static rayon::ThreadPool {
    static POOL: OnceLock<rayon::ThreadPool> = OnceLock::new();
    POOL.get_or_init(|| {
        rayon::ThreadPoolBuilder::new()
            .thread_name(|number| format!("codec-{number}"))
            .build()
            .expect("the operating system has threads")
    })
}

/// Runs `work` on the pool. Not cancelled when the future is dropped: the work still runs to its end.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (send, receive) = tokio::sync::oneshot::channel();
    pool().spawn(move || {
        // The receiver is gone only if nobody wants the result any more.
        let _ = send.send(work());
    });
    receive.await.map_err(|_| Error::new(Kind::Bug, "work on the codec pool panicked"))
}
