//! The commands of ours that PostgreSQL runs during recovery, as its settings have them.

use crate::settings_files::quote_shell;
use std::path::Path;

/// Run for each file. `%` in the path is doubled, for PostgreSQL replaces `%f` and `%p`.
pub fn restore_command(ours: &Path) -> String {
    format!("{} wal-fetch --plan {} %f %p", quoted(&ours.join("backstay")), quoted(ours))
}

/// Run once, when nothing more is asked of `restore_command`. PostgreSQL warns of a failure and opens, but takes what is
/// above 125 for a signal and does not: a program that is not there must not end so.
pub fn recovery_end_command(ours: &Path) -> String {
    format!("{} recovery-end --plan {} || false", quoted(&ours.join("backstay")), quoted(ours))
}

fn quoted(path: &Path) -> String {
    quote_shell(&path.to_string_lossy()).replace('%', "%%")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings_files::{setting, value_of};

    #[test]
    fn the_commands_survive_any_path() {
        let ours = Path::new("/srv/it's 100%f/backstay-restore");
        let fetch = restore_command(ours);
        assert_eq!(
            fetch,
            "'/srv/it'\\''s 100%%f/backstay-restore/backstay' wal-fetch --plan '/srv/it'\\''s 100%%f/backstay-restore' %f %p"
        );
        let line = setting("restore_command", &fetch);
        assert_eq!(value_of(&line, "restore_command"), Some(fetch));
        assert!(recovery_end_command(ours).starts_with("'/srv/it'\\''s 100%%f/"));
    }

    #[test]
    fn a_program_that_is_gone_is_no_signal() {
        let command = recovery_end_command(Path::new("/nowhere/backstay-restore"));
        let output = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
    }
}
