//! Killing a server as a power cut would: all of its processes, at one moment.

use anyhow::{Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::time::{Duration, Instant};

/// Kills a process and its children with SIGKILL and waits until they are gone.
///
/// The parent is stopped first, so that it neither starts new children nor tidies up after them.
pub fn kill_tree(parent: Pid, patience: Duration) -> Result<()> {
    let _ = kill_process(parent, Signal::STOP);
    let all: Vec<Pid> = children(parent).into_iter().chain([parent]).collect();
    // One that ended by itself in the meantime is as dead as it should be.
    for pid in &all {
        let _ = kill_process(*pid, Signal::KILL);
    }
    let deadline = Instant::now() + patience;
    while all.iter().any(|pid| is_alive(*pid)) {
        ensure!(Instant::now() < deadline, "process {parent:?} survives SIGKILL");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// False for one that has ended, also if nobody has asked for its exit status yet.
pub fn is_alive(pid: Pid) -> bool {
    stat(pid.as_raw_nonzero().get()).is_some_and(|(state, _)| state != 'Z' && state != 'X')
}

/// True if the process works in `folder`, as a server does in its data directory. The kernel gives the number of one that has
/// ended to another soon.
pub fn works_in(pid: Pid, folder: &Path) -> bool {
    let cwd = std::fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero()));
    cwd.is_ok_and(|cwd| folder.canonicalize().is_ok_and(|folder| cwd == folder))
}

fn children(parent: Pid) -> Vec<Pid> {
    let parent = parent.as_raw_nonzero().get();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| stat(*pid).is_some_and(|(_, of)| of == parent))
        .filter_map(Pid::from_raw)
        .collect()
}

/// State and parent, as in proc(5). The name before them may hold spaces and brackets.
fn stat(pid: i32) -> Option<(char, i32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
