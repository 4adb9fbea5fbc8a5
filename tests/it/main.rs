//! The black-box tests: real servers, real programs, really killed.
//!
//! | module | what it shows |
//! |---|---|
//! | `harness` | that the harness itself passes what is sound, and nothing else |
//! | `decoder` | the WAL decoder against PostgreSQL's own readers |
//! | `tidy` | that the tree keeps to its layout |
//! | `restore` | every kind of target, on every major, under constant load |
//! | `options` | page checksums, segment sizes, tablespaces, generations, and what `restore` offers |
//! | `kill` | agent and server killed at any moment, state lost |
//! | `s3` | the same over S3, with faults and refusing locations |
//! | `integrity` | damaged, missing and swapped objects, wrong keys and clusters |
//! | `refusals` | bad input: the thing, the reason, the remedy, the exit code |
//! | `synchronous` | commits that wait for locations, outages, a full spool, a slot in danger |
//! | `tls` | logins over TLS |
//! | `status` | what the running agent tells, and when it takes snapshots |

mod decoder;
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
mod synchronous;
mod tidy;
mod tls;
