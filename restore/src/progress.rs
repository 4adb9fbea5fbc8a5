//! How far a long phase has come: a bar where a person looks, a line every few seconds where not.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

const LINE_EVERY: Duration = Duration::from_secs(5);

/// The progress of one phase, in bytes. Cheap to advance from any thread.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    phase: &'static str,
    total_bytes: u64,
    /// When the last line was printed; none where a bar is shown or nothing is.
    last_line: Option<Mutex<Instant>>,
}

impl Progress {
    /// `quiet` shows nothing.
    pub fn new(phase: &'static str, total_bytes: u64, quiet: bool) -> Progress {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(total_bytes),
            match is_terminal && !quiet {
                true => ProgressDrawTarget::stderr_with_hz(5),
                false => ProgressDrawTarget::hidden(),
            },
        );
        let template = "{prefix:<10} [{bar:30}] {bytes:>11} of {total_bytes:<11} {bytes_per_sec:>12}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(phase);
        let last_line = (!is_terminal && !quiet).then(|| Mutex::new(Instant::now()));
        Progress { bar, phase, total_bytes, last_line }
    }

    pub fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        self.line();
    }

    pub fn set(&self, bytes: u64) {
        self.bar.set_position(bytes.min(self.total_bytes));
        self.line();
    }

    fn line(&self) {
        let Some(mut last) = self.last_line.as_ref().and_then(|last| last.try_lock().ok()) else {
            return;
        };
        if last.elapsed() >= LINE_EVERY {
            *last = Instant::now();
            let mib = |bytes: u64| bytes >> 20;
            eprintln!(
                "{}: {} of {} MiB",
                self.phase,
                mib(self.bar.position()),
                mib(self.total_bytes)
            );
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
