//! Whether a server runs in a data directory, as its `postmaster.pid` tells.
//!
//! A process of another container or host is not to be seen from here. Then what answers at the server's own address is taken
//! for the server; a file that a crash left, when another server has that address now, is for a person to remove.

use rustix::process::Pid;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long a place may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(1);
/// Of a name with many addresses no more are tried.
const ADDRESSES_MAX: usize = 4;

/// The process whose cluster this is, if it lives.
pub fn running_server(dir: &Path) -> Option<i32> {
    let pid: i32 = pid_file(dir)?.lines().next()?.trim().parse().ok()?;
    let lives = |pid: &i32| {
        Pid::from_raw(*pid).is_some_and(|pid| {
            !matches!(rustix::process::test_kill_process(pid), Err(rustix::io::Errno::SRCH))
        })
    };
    Some(pid).filter(|pid| *pid > 0).filter(lives).filter(|pid| may_be_postgres(*pid))
}

/// Where something answers that may be a server whose process is not to be seen: its socket or its TCP address. Blocks for
/// some seconds at most, but for the resolver.
pub fn answers_at(dir: &Path) -> Option<String> {
    let text = pid_file(dir)?;
    // Port, first socket folder and first address, empty if there is none ("src/include/utils/pidfile.h").
    let line = |number: usize| text.lines().nth(number - 1).map_or("", str::trim);
    let port: u16 = line(4).parse().ok()?;
    let socket = format!("{}/.s.PGSQL.{port}", line(5));
    if !line(5).is_empty() && UnixStream::connect(&socket).is_ok() {
        return Some(socket);
    }
    let accepts =
        |address: &SocketAddr| TcpStream::connect_timeout(address, ANSWER_TIME_MAX).is_ok();
    addresses(line(6), port).into_iter().find(accepts).map(|address| address.to_string())
}

fn addresses(listens: &str, port: u16) -> Vec<SocketAddr> {
    let host = match listens {
        "" => return Vec::new(),
        "*" | "0.0.0.0" | "::" => "localhost",
        host => host,
    };
    let found = (host, port).to_socket_addrs();
    found.map(|found| found.take(ADDRESSES_MAX).collect()).unwrap_or_default()
}

fn pid_file(dir: &Path) -> Option<String> {
    std::fs::read_to_string(dir.join("postmaster.pid")).ok()
}

/// False only if the process is known to be something else: its number was given anew.
fn may_be_postgres(pid: i32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => name.starts_with("postgres") || name.starts_with("postmaster"),
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    /// Beyond any process number that Linux gives.
    const UNSEEN: i32 = 1 << 30;

    fn left(dir: &Path, port: u16, sockets: &str, listens: &str) {
        let text = format!("{UNSEEN}\n/data\n1\n{port}\n{sockets}\n{listens}\n  1 2\nready   \n");
        std::fs::write(dir.join("postmaster.pid"), text).unwrap();
    }

    #[test]
    fn what_answers_at_its_address_is_taken_for_the_server() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        assert_eq!(answers_at(dir), None, "no file");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        for listens in ["127.0.0.1", "localhost", "*", "0.0.0.0"] {
            left(dir, port, "", listens);
            assert_eq!(answers_at(dir), Some(format!("127.0.0.1:{port}")), "{listens}");
        }
        left(dir, port, "", "");
        assert_eq!(answers_at(dir), None, "it listens nowhere");
        drop(listener);
        left(dir, port, "", "*");
        assert_eq!(answers_at(dir), None, "nobody answers");
        assert_eq!(running_server(dir), None);

        let sockets = dir.display().to_string();
        let _socket = UnixListener::bind(dir.join(".s.PGSQL.5432")).unwrap();
        left(dir, 5432, &sockets, "");
        assert!(answers_at(dir).unwrap().ends_with("/.s.PGSQL.5432"));
    }
}
