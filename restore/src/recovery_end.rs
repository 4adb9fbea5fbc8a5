//! `recovery_end_command`: takes away what only recovery needed, when a restore was left to `pg_ctl start`.
//!
//! PostgreSQL runs it when it has asked `restore_command` for the last time, has removed `recovery.signal` and has written the
//! end of recovery ("src/backend/access/transam/xlog.c", `CleanupAfterArchiveRecovery`). A target at which it pauses or shuts
//! down is no end: nothing goes. The settings go first and the program last, so that a crash between leaves files and
//! no setting that asks for them.

use crate::settings_files::{AtTarget, SettingsFiles, recovery_lines};
use crate::wal_spool::Spool;
use backstay_common::{Context, Error, Kind, Result};
use std::path::Path;

/// Takes away the recovery settings, the WAL in the clear and the program. `ours` is the folder of ours in the data directory of the
/// server that runs this, which is where it runs it.
pub fn finish(ours: &Path) -> Result<()> {
    let here = std::env::current_dir().context("find the directory of the server")?;
    finish_in(&here, ours)
}

/// A copy of a restored directory still names the folder of the one that it was made from, whose recovery may go on.
fn finish_in(here: &Path, ours: &Path) -> Result<()> {
    let ours = here.join(ours).canonicalize().context(format!("find {}", ours.display()))?;
    let dir = ours.parent().unwrap_or(&ours);
    if here.canonicalize().ok().as_deref() != Some(dir) {
        let reason = format!("{} belongs to another data directory", ours.display());
        return Err(Error::new(Kind::Config, reason).remedy(format!(
            "take the block of `backstay` that names it out of {}/postgresql.auto.conf",
            here.display()
        )));
    }
    let (spool, frozen) = Spool::open(&ours)?;
    let files = SettingsFiles { dir, owner: spool.owner() };
    files.finish_recovery(&recovery_lines(&frozen.plan, &ours, AtTarget::Promote))?;
    spool.clear()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::owner::Owner;
    use crate::plan::StopPoint;
    use crate::settings_files::tests::plan;
    use crate::settings_files::{setting, value_of};
    use crate::wal_spool::{Frozen, SavedAccess};
    use backstay_common::lsn::Lsn;

    #[test]
    fn nothing_of_a_recovery_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, ours) = (folder.path(), folder.path().join("backstay-restore"));
        let plan = plan(StopPoint::AfterRecord(Lsn::new(0x512_0000)));
        let frozen = Frozen { plan: plan.clone(), access: SavedAccess::default() };
        let owner = Owner::of_process();
        Spool::create(&ours, owner, &frozen).unwrap();
        let files = SettingsFiles { dir, owner };
        let recovery = recovery_lines(&plan, &ours, AtTarget::Promote);
        let safety = [setting("archive_mode", "off")];
        let auto = dir.join("postgresql.auto.conf");
        // ALTER SYSTEM, given before the cluster is open, writes the file anew without our marks.
        let copy = tempfile::tempdir().unwrap();
        assert_eq!(finish_in(copy.path(), &ours).unwrap_err().kind(), Kind::Config);
        for keeps_marks in [true, false] {
            files.prepare_recovery(&recovery, &safety).unwrap();
            let mut text = std::fs::read_to_string(&auto).unwrap();
            assert!(value_of(&text, "recovery_end_command").unwrap().contains("recovery-end"));
            if !keeps_marks {
                let lines = text.lines().filter(|line| !line.starts_with('#'));
                text = lines.map(|line| format!("{line}\n")).collect();
                std::fs::write(&auto, text + "recovery_target_xid = '9'\n").unwrap();
            }
            finish_in(dir, &ours).unwrap();
            let text = std::fs::read_to_string(&auto).unwrap();
            for name in recovery.iter().filter_map(|line| line.split_once(' ')).map(|line| line.0) {
                assert_eq!(value_of(&text, name), None, "{name} in {text}");
            }
            assert_eq!(value_of(&text, "archive_mode").as_deref(), Some("off"));
            let others = value_of(&text, "recovery_target_xid").is_some();
            assert_eq!(others, !keeps_marks, "what is not ours stays");
            let left = std::fs::read_dir(&ours).unwrap().flatten();
            let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
            assert_eq!(left, ["plan.json"]);
        }
    }
}
