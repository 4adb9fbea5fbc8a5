//! `backup_label`: what PostgreSQL says of a backup when it ends, and needs again when recovery begins.

use backstay_common::lsn::Lsn;
use backstay_common::segment::TimelineId;
use backstay_common::{Error, Kind, Result};

/// A finished backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupLabel {
    /// To be written into the restored directory, byte for byte.
    pub text: String,
    /// Where replay begins.
    pub start: Lsn,
    pub timeline: TimelineId,
    /// The end of the record that ends the backup: before it the restored cluster is not consistent.
    pub stop: Lsn,
}

impl BackupLabel {
    /// Reads the label file that the server gave ("src/backend/access/transam/xlogbackup.c").
    pub fn parse(text: &str, stop: Lsn) -> Result<BackupLabel> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        let start = field("START WAL LOCATION: ").and_then(|value| value.split(' ').next());
        let start = start.and_then(|lsn| lsn.parse::<Lsn>().ok());
        let timeline = field("START TIMELINE: ").and_then(|value| value.trim().parse().ok());
        match (start, timeline.and_then(TimelineId::new)) {
            (Some(start), Some(timeline)) if start <= stop => {
                Ok(BackupLabel { text: text.to_string(), start, timeline, stop })
            }
            _ => Err(Error::new(
                Kind::Postgres,
                format!(
                    "the server ended the backup at {stop} with the label {text:?}, which cannot be"
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &str = "START WAL LOCATION: 1A/4000028 (file 000000020000001A00000004)\n\
        CHECKPOINT LOCATION: 1A/5000060\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
        START TIME: 2026-11-22 02:00:00 UTC\nLABEL: backstay 20261122T020000Z-1f2e3d4c\nSTART TIMELINE: 2\n";

    #[test]
    fn the_start_is_not_the_checkpoint() {
        let label = BackupLabel::parse(LABEL, "1A/6000100".parse().unwrap()).unwrap();
        assert_eq!((label.start, label.timeline.get()), ("1A/4000028".parse().unwrap(), 2));
        assert_eq!(label.text, LABEL);
    }

    #[test]
    fn a_label_without_a_start_or_from_the_future_is_refused() {
        assert!(BackupLabel::parse("LABEL: x\n", Lsn::MAX).is_err());
        assert!(BackupLabel::parse(LABEL, Lsn::new(5)).is_err());
    }
}
