//! When every location has failed to give an object, whether and when to ask them all again.
//!
//! A store that is overloaded or out of reach for some seconds must not end a restore, and bytes may have been damaged on
//! their way. What is missing everywhere, and what is damaged twice, stays so.

use backstay_common::{Error, Kind};
use std::time::Duration;

/// Pauses before each further round while a location is out of reach: some 15 s, and what the requests themselves take.
const PAUSES: [Duration; 5] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
];

/// The rounds of asking for one object.
#[derive(Debug, Default)]
pub struct Rounds {
    ended: usize,
}

impl Rounds {
    /// A round has ended with these faults of the locations. True, after a pause, if there is to be another.
    pub async fn again<'e>(&mut self, faults: impl IntoIterator<Item = &'e Error>) -> bool {
        let pause = self.pause(faults);
        self.ended += 1;
        tokio::time::sleep(pause.unwrap_or_default()).await;
        pause.is_some()
    }

    fn pause<'e>(&self, faults: impl IntoIterator<Item = &'e Error>) -> Option<Duration> {
        let kinds: Vec<Kind> = faults.into_iter().map(Error::kind).collect();
        match () {
            () if kinds.contains(&Kind::Storage) => PAUSES.get(self.ended).copied(),
            () if kinds.contains(&Kind::Corrupt) && self.ended == 0 => Some(Duration::ZERO),
            () => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(kinds: &[Kind]) -> (usize, Duration) {
        let faults: Vec<Error> = kinds.iter().map(|kind| Error::new(*kind, "no")).collect();
        let pauses = (0..100).map_while(|ended| Rounds { ended }.pause(&faults));
        let pauses: Vec<Duration> = pauses.collect();
        (pauses.len(), pauses.iter().sum())
    }

    #[test]
    fn only_what_may_pass_is_waited_for() {
        let patience = Duration::from_millis(15_500);
        assert_eq!(rounds(&[]), (0, Duration::ZERO));
        assert_eq!(rounds(&[Kind::Missing, Kind::Missing]), (0, Duration::ZERO));
        assert_eq!(rounds(&[Kind::Key]), (0, Duration::ZERO));
        assert_eq!(rounds(&[Kind::Missing, Kind::Corrupt]), (1, Duration::ZERO), "read once more");
        assert_eq!(rounds(&[Kind::Missing, Kind::Storage]), (5, patience));
        assert_eq!(rounds(&[Kind::Corrupt, Kind::Storage]), (5, patience));
    }
}
