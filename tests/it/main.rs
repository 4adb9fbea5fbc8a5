//! The black-box tests: real servers, real programs, really killed.
//!
//! | module | what it shows |
//! |---|---|
//! | `base_backup` | snapshots over the network, and of a standby |
//! | `harness` | that the harness itself passes what is sound, and nothing else |
//! | `decoder` | the WAL decoder against PostgreSQL's own readers |
//! | `tidy` | that the tree keeps to its layout |
//! | `restore` | every kind of target, on every major, under constant load |
//! | `delta` | restored over the cluster's own directory |
//! | `options` | page checksums, segment sizes, tablespaces, generations, and what `restore` offers |
//! | `apart` | two histories of one cluster, two agents of one server, WAL that nobody has |
//! | `failover` | servers that take over from each other, and agents that do |
//! | `memory` | the agent's memory, however many and large the files are |
//! | `mixed` | snapshots under all kinds of DDL, and moments between, on each way to take them |
//! | `interrupted` | snapshots that are killed and taken up again |
//! | `kill` | agent and server killed at any moment, state lost |
//! | `snapshots` | snapshots that refer to each other: right, and at the cost of what changed |
//! | `s3` | the same over S3, with faults and refusing locations |
//! | `sync` | locations that differ: found, named, made equal |
//! | `index` | indexes of WAL, and what requests a location gets |
//! | `schedules` | random schedules of kills, promotions and faults: nothing acknowledged is ever missing |
//! | `integrity` | damaged, missing and swapped objects, wrong keys and clusters |
//! | `refusals` | bad input: the thing, the reason, the remedy, the exit code |
//! | `retention` | prune, pins, and restores beside them |
//! | `synchronous` | commits that wait for locations, outages, a full spool, a slot in danger |
//! | `tls` | logins over TLS |
//! | `stores` | stores of all kinds, their roles, and what is refused of them |
//! | `status` | what the running agent tells, and when it takes snapshots |

mod apart;
mod base_backup;
mod decoder;
mod delta;
mod failover;
mod folder;
mod harness;
mod index;
mod integrity;
mod interrupted;
mod kill;
mod memory;
mod mixed;
mod options;
mod refusals;
mod restore;
mod retention;
mod s3;
mod schedules;
mod site;
mod snapshots;
mod status;
mod stores;
mod sync;
mod synchronous;
mod tidy;
mod tls;
