//! Which files are stored again, so that a restore never reads much more than the database has.
//!
//! A frame whose pages were superseded is read for those that are left. What a restore reads is therefore bounded, over the
//! whole database: where the bound is passed, the worst files are stored again, whole. Small files share
//! frames; a frame of which little is left is given up.

use backstay_common::snapshot::{Content, FrameRef};
use std::collections::{HashMap, HashSet};

/// What a restore may read, in percent of the database's bytes.
pub const READ_BYTES_BOUND_PERCENT: u64 = 135;
/// A shared frame with less of it in use, in percent, is given up.
const SHARED_LIVE_MIN_PERCENT: u64 = 40;

pub const ENTRY_BYTES: usize = 40;

/// One file in the index of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// [`path_hash`]
    pub path: u64,
    /// Where its record is.
    pub at: u64,
    pub size: u64,
    /// Plain bytes of the frames that a restore of it reads.
    pub read_bytes: u64,
    /// Which frame holds all of it; 0 if it has a map.
    pub frame: u64,
}

impl Line {
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let words = [self.path, self.at, self.size, self.read_bytes, self.frame];
        let mut line = [0; ENTRY_BYTES];
        line.as_chunks_mut::<8>().0.iter_mut().zip(words).for_each(|(to, w)| *to = w.to_le_bytes());
        line
    }

    pub fn decode(line: &[u8; ENTRY_BYTES]) -> Line {
        let word = |n: usize| u64::from_le_bytes(line.as_chunks::<8>().0[n]);
        Line { path: word(0), at: word(1), size: word(2), read_bytes: word(3), frame: word(4) }
    }
}

/// Two paths share one about never, and the record names the path.
pub fn path_hash(path: &str) -> u64 {
    short_hash(path.as_bytes())
}

/// What stands for a content's only frame; 0 for a map.
pub fn frame_key(content: &Content) -> u64 {
    match content {
        Content::Within { frame: FrameRef { pack, span }, .. } => {
            short_hash(&[&pack.as_bytes()[..], &span.number.to_le_bytes()].concat()).max(1)
        }
        _ => 0,
    }
}

fn short_hash(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(blake3::hash(bytes).as_bytes()[..8].try_into().expect("8 bytes"))
}

/// The files and shared frames that are given up.
#[derive(Debug, Default)]
pub struct Wear {
    files: HashSet<u64>,
    frames: HashSet<u64>,
}

impl Wear {
    pub fn of(index: &[[u8; ENTRY_BYTES]]) -> Wear {
        let lines = || index.iter().map(Line::decode);
        let mut shared: HashMap<u64, (u64, u64)> = HashMap::new();
        let (mut size, mut read) = (0, 0);
        let mut mapped = Vec::new();
        for line in lines() {
            size += line.size;
            if line.frame == 0 {
                read += line.read_bytes;
                if line.read_bytes > line.size {
                    mapped.push(line);
                }
            } else {
                let frame = shared.entry(line.frame).or_insert((line.read_bytes, 0));
                frame.1 += line.size;
            }
        }
        let is_worn = |(bytes, live): &(u64, u64)| live * 100 < bytes * SHARED_LIVE_MIN_PERCENT;
        read += shared.values().map(|(bytes, _)| bytes).sum::<u64>();
        let frames = shared.iter().filter(|(_, frame)| is_worn(frame)).map(|(key, _)| *key);
        let frames = frames.collect();
        // The worst first: those of which a restore reads most for each byte that it wants.
        let ratio = |line: &Line| line.read_bytes as f64 / line.size.max(1) as f64;
        mapped.sort_by(|a, b| ratio(b).total_cmp(&ratio(a)));
        let mut files = HashSet::new();
        for line in mapped {
            if read * 100 <= size * READ_BYTES_BOUND_PERCENT {
                break;
            }
            read -= line.read_bytes - line.size;
            files.insert(line.path);
        }
        Wear { files, frames }
    }

    pub fn is_worn(&self, line: &Line) -> bool {
        self.files.contains(&line.path) || self.frames.contains(&line.frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worn(lines: &[Line]) -> Vec<u64> {
        let index: Vec<_> = lines.iter().map(Line::encode).collect();
        let wear = Wear::of(&index);
        lines.iter().filter(|line| wear.is_worn(line)).map(|line| line.path).collect()
    }

    fn mapped(path: u64, size: u64, read_bytes: u64) -> Line {
        Line { path, at: 0, size, read_bytes, frame: 0 }
    }

    #[test]
    fn lines_read_back() {
        let line = Line { path: 1, at: 2, size: 3, read_bytes: u64::MAX, frame: 5 };
        assert_eq!(Line::decode(&line.encode()), line);
    }

    #[test]
    fn only_the_worst_files_are_stored_again_and_only_beyond_the_bound() {
        let within = [mapped(1, 1000, 1200), mapped(2, 1000, 1500)];
        assert!(worn(&within).is_empty());
        let beyond = [mapped(1, 1000, 1200), mapped(2, 1000, 1501), mapped(3, 1000, 1400)];
        assert_eq!(worn(&beyond), [2], "without the worst it is 1.2");
        assert_eq!(worn(&[mapped(1, 100, 1000), mapped(2, 100, 900)]), [1, 2]);
    }

    #[test]
    fn a_shared_frame_is_given_up_when_little_of_it_is_left() {
        let shared = |path, size, frame| Line { path, at: 0, size, read_bytes: 1000, frame };
        let lines =
            [shared(1, 200, 7), shared(2, 199, 7), shared(3, 400, 8), mapped(4, 9000, 9000)];
        assert_eq!(worn(&lines), [1, 2]);
    }
}
