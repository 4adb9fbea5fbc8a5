//! SQL by the simple query protocol: text in, rows of text out.

use super::Connection;
use super::fault::{Report, closed, lost, unexpected};
use super::wire::Frame;
use crate::{Error, Kind, Result};
use bytes::Bytes;
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{DataRowBody, Message};
use postgres_protocol::message::frontend;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

/// The rows of all results of one call may hold this many bytes, with what they cost here.
pub const RESULT_BYTES_MAX: usize = 64 << 20;
/// What a row costs beside its bytes, roughly.
const ROW_OVERHEAD_BYTES: usize = 96;
const FIELD_OVERHEAD_BYTES: usize = 24;

/// What one statement gave.
#[derive(Debug, Default)]
pub struct ResultSet {
    /// Names of the columns; none for a statement without a result.
    pub columns: Arc<[String]>,
    pub rows: Vec<Row>,
    /// The command tag, such as "SELECT 1"; empty for an empty statement.
    pub tag: String,
}

/// One row, as text.
#[derive(Clone, Debug)]
pub struct Row {
    columns: Arc<[String]>,
    body: Bytes,
    fields: Box<[Option<Range<usize>>]>,
}

impl Row {
    /// Column `n` from 0; none if it is NULL, is not there or is not UTF-8.
    pub fn get(&self, n: usize) -> Option<&str> {
        std::str::from_utf8(self.bytes(n)?).ok()
    }

    /// Column `n` from 0 as it was sent; none if it is NULL or is not there.
    pub fn bytes(&self, n: usize) -> Option<&[u8]> {
        self.fields.get(n)?.clone().map(|range| &self.body[range])
    }

    /// The first column of this name; none if it is NULL, is not there or is not UTF-8.
    pub fn by_name(&self, name: &str) -> Option<&str> {
        self.get(self.columns.iter().position(|column| column == name)?)
    }

    /// As [`Row::by_name`], for a column that must have a value: an error names it if it has none.
    pub fn text(&self, name: &str) -> Result<&str> {
        self.by_name(name).ok_or_else(|| {
            Error::new(
                Kind::Postgres,
                format_args!("the server's answer has no value for {name:?}"),
            )
        })
    }

    /// As [`Row::text`], read as a `T`.
    pub fn parse<T: FromStr>(&self, name: &str) -> Result<T> {
        let text = self.text(name)?;
        text.parse().map_err(|_| {
            Error::new(
                Kind::Postgres,
                format_args!("the server's answer has {text:?} for {name:?}"),
            )
        })
    }

    /// Names of the columns, in order.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    pub(super) fn read(columns: &Arc<[String]>, body: &DataRowBody) -> std::io::Result<Row> {
        let fields = body.ranges().collect::<Vec<_>>()?.into_boxed_slice();
        // A copy, so that a few rows kept do not keep the whole buffer that they came in.
        let bytes = Bytes::copy_from_slice(body.buffer());
        Ok(Row { columns: columns.clone(), body: bytes, fields })
    }

    fn cost(&self) -> usize {
        self.body.len() + ROW_OVERHEAD_BYTES + self.fields.len() * FIELD_OVERHEAD_BYTES
    }
}

impl Connection {
    /// Runs `sql` and gives the rows of its last statement that has any columns.
    ///
    /// The error of a failed statement has its SQLSTATE, and the connection can go on. Not safe to drop before it
    /// is done: the connection then refuses further work. All rows are held; see [`RESULT_BYTES_MAX`].
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>> {
        let mut sets = self.query_sets(sql).await?;
        let last = sets.iter().rposition(|set| !set.columns.is_empty());
        Ok(last.map(|n| sets.swap_remove(n).rows).unwrap_or_default())
    }

    /// Runs `sql` and gives its only row; anything but one row is an error.
    pub async fn query_one(&mut self, sql: &str) -> Result<Row> {
        let mut rows = self.query(sql).await?;
        match (rows.pop(), rows.len()) {
            (Some(row), 0) => Ok(row),
            (row, more) => {
                let count = more + usize::from(row.is_some());
                Err(self.fault(format_args!("{count} rows where one was expected, from: {sql}")))
            }
        }
    }

    /// Runs the statements of `sql` and gives what each of them gave. As [`Connection::query`] otherwise.
    pub async fn query_sets(&mut self, sql: &str) -> Result<Vec<ResultSet>> {
        self.begin()?;
        self.wire.put(|buf| frontend::query(sql, buf))?;
        let done = match self.wire.flush().await {
            Ok(()) => self.results().await,
            Err(error) => Err(lost(error)),
        };
        done.map_err(|error| error.context(&self.label))
    }

    /// Reads results until the server waits for us again; an error among them is given then.
    pub(super) async fn results(&mut self) -> Result<Vec<ResultSet>> {
        let mut results = Results::default();
        loop {
            match self.message().await {
                Ok(Some(Frame::Message(Message::ReadyForQuery(_)))) => {
                    self.is_idle = true;
                    return results.finish();
                }
                Ok(Some(Frame::Message(message))) => results.take(message)?,
                Ok(Some(_)) => return Err(unexpected("running a query")),
                // A fatal error is followed by the end of the connection; the error says more.
                Ok(None) => return Err(results.error.unwrap_or_else(closed)),
                Err(error) => return Err(results.error.unwrap_or(error)),
            }
        }
    }
}

/// Results as they come in.
#[derive(Default)]
struct Results {
    sets: Vec<ResultSet>,
    current: ResultSet,
    bytes: usize,
    error: Option<Error>,
}

impl Results {
    fn take(&mut self, message: Message) -> Result<()> {
        match message {
            Message::RowDescription(body) => {
                let names =
                    body.fields().map(|field| Ok(field.name().to_string())).collect::<Vec<_>>();
                self.current.columns = names.map_err(lost)?.into();
            }
            Message::DataRow(body) => {
                let row = Row::read(&self.current.columns, &body).map_err(lost)?;
                self.bytes += row.cost();
                if self.bytes > RESULT_BYTES_MAX {
                    let most = RESULT_BYTES_MAX >> 20;
                    return Err(Error::new(
                        Kind::Postgres,
                        format_args!("the result of a query is larger than {most} MiB"),
                    ));
                }
                self.current.rows.push(row);
            }
            Message::CommandComplete(body) => {
                self.current.tag = body.tag().map_err(lost)?.to_string();
                self.end_set();
            }
            Message::EmptyQueryResponse => self.end_set(),
            Message::ErrorResponse(body) => {
                self.error.get_or_insert_with(|| Report::read(body.fields()).into_error());
            }
            _ => return Err(unexpected("running a query")),
        }
        Ok(())
    }

    fn end_set(&mut self) {
        self.sets.push(std::mem::take(&mut self.current));
    }

    fn finish(self) -> Result<Vec<ResultSet>> {
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.sets),
        }
    }
}
