//! Messages on the wire: framed, bounded, and safe to wait for.
//!
//! `postgres-protocol` decodes what it knows; the frames it does not (CopyBothResponse, protocol negotiation) are
//! split off here. A message's length is checked in its header, before anything is buffered for it.

use crate::{Error, Kind, Result};
use bytes::{Buf, BytesMut};
use postgres_protocol::message::backend::{Header, Message};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest message taken from a server that has let us in.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// The longest message taken before that; PostgreSQL's own are below 2 KiB, but for error texts.
pub(super) const LOGIN_MESSAGE_BYTES_MAX: usize = 64 << 10;
/// How much is asked of the socket at once: a WAL message of 128 KiB fits.
const READ_BYTES: usize = 132 << 10;

/// A socket of any kind.
pub(super) trait Socket: AsyncRead + AsyncWrite + Unpin + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Socket for T {}

/// One message from the server.
pub(super) enum Frame {
    Message(Message),
    /// 'W': both sides may now send CopyData.
    CopyBoth,
    /// 'v': the server speaks an older minor version, or knows fewer options.
    NegotiateVersion,
}

/// A socket with what was read and not yet decoded, and what was encoded and not yet written.
pub(super) struct Wire {
    socket: Box<dyn Socket>,
    incoming: BytesMut,
    outgoing: BytesMut,
    message_bytes_max: usize,
}

impl Wire {
    /// `incoming` messages are held to the bound for a login until [`Wire::trust`].
    pub fn new(socket: Box<dyn Socket>) -> Wire {
        Wire {
            socket,
            incoming: BytesMut::new(),
            outgoing: BytesMut::new(),
            message_bytes_max: LOGIN_MESSAGE_BYTES_MAX,
        }
    }

    /// The server has let us in, and we it: longer messages are fine from now on.
    pub fn trust(&mut self) {
        self.message_bytes_max = MESSAGE_BYTES_MAX;
    }

    /// From now on no message may be longer.
    pub fn set_message_max(&mut self, bytes: usize) {
        self.message_bytes_max = bytes;
    }

    /// Encodes into the buffer of what is to be written; [`Wire::flush`] writes it.
    pub fn put(&mut self, encode: impl FnOnce(&mut BytesMut) -> io::Result<()>) -> Result<()> {
        let before = self.outgoing.len();
        encode(&mut self.outgoing).map_err(|error| {
            self.outgoing.truncate(before);
            Error::new(Kind::Bug, format_args!("encode a message to PostgreSQL: {error}"))
        })
    }

    /// Bytes encoded and not yet written.
    pub fn unwritten(&self) -> usize {
        self.outgoing.len()
    }

    /// Writes what was encoded. Safe to drop: what is left is written by the next call.
    pub async fn flush(&mut self) -> io::Result<()> {
        while self.outgoing.has_remaining() {
            if self.socket.write_buf(&mut self.outgoing).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        self.socket.flush().await
    }

    /// The next message; none if the server has closed the connection between two. Safe to drop.
    pub async fn frame(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = take_frame(&mut self.incoming, self.message_bytes_max)? {
                return Ok(Some(frame));
            }
            self.incoming.reserve(READ_BYTES);
            if self.socket.read_buf(&mut self.incoming).await? == 0 {
                return match self.incoming.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    /// Says goodbye and closes.
    pub async fn close(&mut self) -> io::Result<()> {
        postgres_protocol::message::frontend::terminate(&mut self.outgoing);
        self.flush().await?;
        self.socket.shutdown().await
    }
}

/// Splits the first message off, if all of it is there.
fn take_frame(incoming: &mut BytesMut, bytes_max: usize) -> io::Result<Option<Frame>> {
    let Some(header) = Header::parse(incoming)? else { return Ok(None) };
    let bytes = header.len() as usize + 1;
    if bytes > bytes_max {
        let tag = header.tag().escape_ascii();
        return Err(invalid(format!("a message '{tag}' of {bytes} bytes, more than {bytes_max}")));
    }
    if incoming.len() < bytes {
        return Ok(None);
    }
    let mut message = incoming.split_to(bytes);
    match header.tag() {
        b'W' => Ok(Some(Frame::CopyBoth)),
        b'v' => Ok(Some(Frame::NegotiateVersion)),
        _ => Ok(Message::parse(&mut message)?.map(Frame::Message)),
    }
}

pub(super) fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut;
    use proptest::prelude::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.put_u32(body.len() as u32 + 4);
        bytes.extend_from_slice(body);
        bytes
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = take_frame(&mut bytes, 200) {}
        }

        #[test]
        fn messages_come_out_as_they_went_in(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 1..8),
            cut in 1usize..20,
        ) {
            let stream: Vec<u8> = bodies.iter().flat_map(|body| message(b'd', body)).collect();
            let mut incoming = BytesMut::new();
            let mut found = Vec::new();
            for part in stream.chunks(cut) {
                incoming.extend_from_slice(part);
                while let Some(frame) = take_frame(&mut incoming, 1000).unwrap() {
                    let Frame::Message(Message::CopyData(data)) = frame else { panic!() };
                    found.push(data.data().to_vec());
                }
            }
            prop_assert_eq!(found, bodies);
        }
    }

    #[test]
    fn a_length_is_refused_from_its_header() {
        let mut header = BytesMut::from(&b"D\x04\x00\x00\x01"[..]);
        let error = take_frame(&mut header, MESSAGE_BYTES_MAX).err().unwrap();
        assert!(error.to_string().contains("'D' of 67108866 bytes"), "{error}");
        let mut allowed = BytesMut::from(&b"D\x03\xff\xff\xff"[..]);
        assert!(take_frame(&mut allowed, MESSAGE_BYTES_MAX).unwrap().is_none());
        for bad in [&b"D\x00\x00\x00\x03"[..], b"D\xff\xff\xff\xff"] {
            assert!(take_frame(&mut BytesMut::from(bad), MESSAGE_BYTES_MAX).is_err());
        }
    }

    #[tokio::test]
    async fn a_message_cut_short_is_an_error_and_a_close_between_two_is_not() {
        let whole = message(b'Z', b"I");
        for (sent, complete) in [(whole.len(), true), (whole.len() - 1, false), (3, false)] {
            let (mut server, client) = tokio::io::duplex(64);
            server.write_all(&whole[..sent]).await.unwrap();
            drop(server);
            let mut wire = Wire::new(Box::new(client));
            let first = wire.frame().await;
            assert_eq!(matches!(first, Ok(Some(_))), complete);
            if complete {
                assert!(wire.frame().await.unwrap().is_none());
            }
        }
    }
}
