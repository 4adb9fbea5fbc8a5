//! Alarms: named conditions that a person must know of.
//!
//! Raised and cleared here and nowhere else, logged when they change, shown by `status`. An alarm is one name and one
//! subject, such as "location-behind" and "virginia"; raising it again only renews its message.

use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// A condition, as status shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Alarm {
    /// What kind of condition: kebab-case, stable.
    pub name: &'static str,
    /// Which location, file or branch it is about; empty where there is only one.
    pub subject: String,
    /// The thing and the reason.
    pub message: String,
    pub since: jiff::Timestamp,
}

/// All alarms of one agent.
#[derive(Debug, Default)]
pub struct Alarms {
    raised: Mutex<BTreeMap<(&'static str, String), Alarm>>,
}

impl Alarms {
    pub fn raise(&self, name: &'static str, subject: &str, message: impl std::fmt::Display) {
        let message = message.to_string();
        let mut raised = self.raised.lock().expect("no panic while held");
        let alarm = raised.entry((name, subject.to_string())).or_insert_with(|| {
            tracing::error!(alarm = name, subject, "alarm raised: {message}");
            Alarm {
                name,
                subject: subject.to_string(),
                message: String::new(),
                since: jiff::Timestamp::now(),
            }
        });
        alarm.message = message;
    }

    /// Does nothing if the alarm is not raised.
    pub fn clear(&self, name: &'static str, subject: &str) {
        let mut raised = self.raised.lock().expect("no panic while held");
        if raised.remove(&(name, subject.to_string())).is_some() {
            tracing::info!(alarm = name, subject, "alarm cleared");
        }
    }

    /// By name, then subject.
    pub fn list(&self) -> Vec<Alarm> {
        self.raised.lock().expect("no panic while held").values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_keeps_its_beginning_until_it_is_cleared() {
        let alarms = Alarms::default();
        alarms.raise("location-down", "virginia", "connection refused");
        let since = alarms.list()[0].since;
        alarms.raise("location-down", "virginia", "timed out");
        alarms.raise("location-down", "attic", "disk full");
        assert_eq!(alarms.list().len(), 2);
        assert_eq!((alarms.list()[1].since, &alarms.list()[1].message[..]), (since, "timed out"));
        alarms.clear("location-down", "virginia");
        alarms.clear("location-down", "nowhere");
        assert_eq!(alarms.list().len(), 1);
    }
}
