//! What `status` shows: the frontier, the spool, snapshots and alarms of the running agent.

use crate::alarms::Alarm;
use crate::snapshot::SnapshotProgress;
use crate::wal::WalStatus;
use backstay_common::id::{AgentName, ClusterName, LocationName, SnapshotId, SystemId};
use backstay_common::location::Requests;
use serde::Serialize;

/// Everything, at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    pub agent: AgentName,
    pub version: &'static str,
    pub cluster: ClusterName,
    pub system: SystemId,
    pub started: jiff::Timestamp,
    pub wal: WalStatus,
    pub snapshots: SnapshotStatus,
    /// In the order of the config.
    pub requests: Vec<LocationRequests>,
    pub alarms: Vec<Alarm>,
}

/// What a location has been asked since the agent started: what a store charges for.
#[derive(Clone, Debug, Serialize)]
pub struct LocationRequests {
    pub location: LocationName,
    #[serde(flatten)]
    pub requests: Requests,
}

/// What the agent knows of snapshots.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SnapshotStatus {
    pub running: Option<SnapshotProgress>,
    /// The newest that is committed at some location.
    pub last: Option<SnapshotId>,
    /// Why the last attempt failed, if it did.
    pub last_error: Option<String>,
    pub next: Option<jiff::Timestamp>,
}

/// Status as a person reads it, from the JSON that the agent answered.
pub fn for_people(status: &serde_json::Value) -> String {
    use std::fmt::Write;
    let text = |path: &str| match status.pointer(path) {
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(serde_json::Value::Null) | None => "-".to_string(),
        Some(other) => other.to_string(),
    };
    let mut out = String::new();
    let mut line = |label: &str, value: String| {
        let _ = writeln!(out, "{label:<14}{value}");
    };
    line("cluster", format!("{} (system {})", text("/cluster"), text("/system")));
    line(
        "agent",
        format!("{} {}, up since {}", text("/agent"), text("/version"), text("/started")),
    );
    let connected = match (&text("/wal/connected")[..], &text("/wal/standing_by")[..]) {
        ("true", _) => "streaming",
        (_, "true") => "standing by a standby",
        _ => "NOT CONNECTED",
    };
    line(
        "postgresql",
        format!(
            "{connected}, timeline {}, WAL end {}",
            text("/wal/timeline"),
            text("/wal/server_end")
        ),
    );
    line("received", text("/wal/received"));
    line(
        "spooled",
        format!("{} ({} bytes on disk)", text("/wal/spooled"), text("/wal/spool_bytes")),
    );
    line("acknowledged", text("/wal/acknowledged"));
    for location in
        status.pointer("/wal/locations").and_then(|l| l.as_array()).into_iter().flatten()
    {
        let field = |name: &str| {
            location[name].as_str().map_or_else(|| location[name].to_string(), str::to_string)
        };
        let mut state = format!(
            "stored {}, behind {} bytes, {} s",
            field("stored"),
            field("behind_bytes"),
            field("behind_seconds")
        );
        if location["role"] == "best-effort" {
            state.push_str("; best-effort");
        }
        if !location["last_error"].is_null() {
            let _ = write!(state, "; {}", field("last_error"));
        }
        line(&format!("  {}", field("name")), state);
    }
    let running = match status.pointer("/snapshots/running") {
        None | Some(serde_json::Value::Null) => String::new(),
        Some(progress) => format!(", running: {}", progress["phase"].as_str().unwrap_or("?")),
    };
    line(
        "snapshots",
        format!("last {}, next {}{running}", text("/snapshots/last"), text("/snapshots/next")),
    );
    if text("/snapshots/last_error") != "-" {
        line("", format!("last attempt failed: {}", text("/snapshots/last_error")));
    }
    for asked in status.pointer("/requests").and_then(|r| r.as_array()).into_iter().flatten() {
        let kinds = ["put", "get", "head", "list", "delete"];
        let counts: Vec<String> =
            kinds.iter().map(|kind| format!("{kind} {}", asked[kind])).collect();
        let place = asked["location"].as_str().unwrap_or("?");
        line("requests", format!("{place}: {}", counts.join(", ")));
    }
    let alarms = status.pointer("/alarms").and_then(|a| a.as_array()).cloned().unwrap_or_default();
    if alarms.is_empty() {
        line("alarms", "none".into());
    }
    for alarm in &alarms {
        let field = |name: &str| alarm[name].as_str().unwrap_or_default().to_string();
        line(
            "ALARM",
            format!(
                "{} {}: {} (since {})",
                field("name"),
                field("subject"),
                field("message"),
                field("since")
            ),
        );
    }
    out
}
