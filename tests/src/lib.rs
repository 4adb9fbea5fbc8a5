//! The harness that every black-box test starts from.
//!
//! A test plays in a [`scene::Scene`]: a folder of its own, its turn on the machine, a time limit, and
//! randomness that the printed seed repeats. In it stand throw-away servers ([`postgres::Cluster`]) and the
//! two programs ([`programs`]). A [`ledger::Ledger`] writes to a server while things are killed, and can
//! then say of a restored one which transactions must and must not be there; [`checks`] says if the
//! restored files are sound. A [`bucket::Bucket`] is an S3 server with faults on demand.

pub mod bucket;
pub mod certificate;
pub mod checks;
pub mod gcs;
pub mod ledger;
pub mod major;
pub mod postgres;
pub mod programs;
pub mod random;
pub mod scene;
pub mod wal;
