//! The black-box tests: real servers, real programs, really killed.
//!
//! | module | what it shows |
//! |---|---|
//! | `harness` | that the harness itself passes what is sound, and nothing else |
//! | `decoder` | the WAL decoder against PostgreSQL's own readers |
//! | `tidy` | that the tree keeps to its layout |
//! | `restore` | every kind of target, on every major, under constant load |
//! | `options` | page checksums, segment sizes, tablespaces, generations, and what `restore` offers |
//! | `apart` | two histories of one cluster, two agents of one server, WAL that nobody has |
//! | `failover` | servers that take over from each other, and agents that do |
//! | `kill` | agent and server killed at any moment, state lost |
//! | `s3` | the same over S3, with faults and refusing locations |
//! | `integrity` | damaged, missing and swapped objects, wrong keys and clusters |
//! | `refusals` | bad input: the thing, the reason, the remedy, the exit code |
//! | `tls` | logins over TLS |
//! | `status` | what the running agent tells, and when it takes snapshots |

mod apart;
mod decoder;
mod failover;
mod folder;
mod harness;
mod integrity;
mod kill;
mod options;
mod refusals;
mod restore;
mod s3;
mod site;
mod status;
mod tidy;
mod tls;
