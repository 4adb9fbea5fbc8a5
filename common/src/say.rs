//! What the programs print.

use crate::{Error, Kind, Result};
use std::fmt::Display;
use std::io::{ErrorKind, Write};

/// Prints a line, or several, to stdout. A reader that has gone away, as `| head` does, is no reason to stop: a restore goes
/// on. What else is wrong with stdout, such as a full disk, is an error.
pub fn say(text: impl Display) -> Result<()> {
    say_to(&mut std::io::stdout().lock(), text)
}

fn say_to(out: &mut impl Write, text: impl Display) -> Result<()> {
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::new(Kind::Local, error).context("print to stdout"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fails(ErrorKind);

    impl Write for Fails {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn only_a_reader_that_went_away_does_not_matter() {
        let mut out = Vec::new();
        say_to(&mut out, "one\ntwo").unwrap();
        assert_eq!(out, b"one\ntwo\n");
        say_to(&mut Fails(ErrorKind::BrokenPipe), "nobody hears it").unwrap();
        assert_eq!(say_to(&mut Fails(ErrorKind::StorageFull), "").unwrap_err().kind(), Kind::Local);
    }
}
