//! Whether PostgreSQL's commits wait for this agent, and what they get for it.
//!
//! An agent in `synchronous_standby_names` whose word is its local spool promises less than is asked of it: a lost
//! host takes the spool along. That is an alarm, for as long as it is so.

use crate::connect;
use crate::context::AgentContext;
use backstay_common::config::{Acknowledge, Settings};
use backstay_common::postgres::{Connection, Mode};
use backstay_common::{Context, Result};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const LOOK_EVERY: Duration = Duration::from_secs(30);
const ALARM: &str = "synchronous-spool";

/// Looks every half minute until the agent stops. A server that cannot be asked changes nothing.
pub async fn watch(context: Arc<AgentContext>) -> Result<()> {
    if context.settings.durability.acknowledge != Acknowledge::Spool {
        // For locations, if at all.
        context.nobody_waits.store(true, Ordering::Relaxed);
        context.stop.cancelled().await;
        return Ok(());
    }
    loop {
        match is_waited_for(&context.settings).await {
            Ok(is_waited_for) => {
                context.nobody_waits.store(!is_waited_for, Ordering::Relaxed);
                match is_waited_for {
                    true => context.alarms.raise(ALARM, "", WEAK),
                    false => context.alarms.clear(ALARM, ""),
                }
            }
            Err(error) => tracing::debug!(%error, "synchronous_standby_names cannot be read"),
        }
        tokio::select! {
            () = context.stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

/// Why `acknowledge = "spool"` is too little where commits wait.
pub const WEAK: &str = "the agent is in synchronous_standby_names and acknowledges \"spool\": a commit returns when \
    only this host has it";

/// True if `synchronous_standby_names` names this agent's connection.
pub async fn is_waited_for(settings: &Settings) -> Result<bool> {
    let conninfo = connect::conninfo(settings)?;
    let mut sql = Connection::connect(&conninfo, Mode::Sql).await?;
    let row = sql
        .query_one("select current_setting('synchronous_standby_names') as names")
        .await
        .context("ask for synchronous_standby_names")?;
    let application = conninfo.application_name().unwrap_or_default();
    let is_named = names(row.text("names")?, application);
    sql.close().await;
    Ok(is_named)
}

/// True if `setting` (src/backend/replication/syncrep_gram.y) holds `application`, or `*` for anybody. The keywords FIRST
/// and ANY, with their number, stand before parentheses; a name may be quoted; case does not matter.
pub fn names(setting: &str, application: &str) -> bool {
    let list = match (setting.find('('), setting.rfind(')')) {
        (Some(open), Some(close)) if open < close && !setting[..open].contains('"') => {
            &setting[open + 1..close]
        }
        _ => setting,
    };
    let mut name = String::new();
    let mut found = Vec::new();
    let mut quoted = false;
    let mut rest = list.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '"' if quoted && rest.peek() == Some(&'"') => name.extend(rest.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => found.push(std::mem::take(&mut name)),
            c if c.is_whitespace() && !quoted => {}
            c => name.push(c),
        }
    }
    found.push(name);
    found.iter().any(|name| name == "*" || name.eq_ignore_ascii_case(application))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_the_setting_is_understood() {
        for setting in [
            "backstay_db1",
            "standby, backstay_db1",
            "Backstay_DB1",
            "ANY 1 (a, backstay_db1)",
            "first 2 (a , b,backstay_db1 )",
            "2 (\"a,b\", \"backstay_db1\")",
            "\"a(b\", backstay_db1",
            "ANY 1 (*)",
            "*",
        ] {
            assert!(names(setting, "backstay_db1"), "{setting}");
        }
        for setting in
            ["", "a", "ANY 1 (a, b)", "backstay_db12", "\"a, backstay_db1\"", "\"a\"\"b\""]
        {
            assert!(!names(setting, "backstay_db1"), "{setting}");
        }
        assert!(names("\"a\"\"b\"", "a\"b"));
    }
}
