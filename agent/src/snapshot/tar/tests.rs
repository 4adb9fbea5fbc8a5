//! Archives cut anywhere, and archives that are none.

use super::*;
use proptest::prelude::*;

/// Makes archives as PostgreSQL does.
#[derive(Clone, Debug, Default)]
pub struct TarBuilder(pub Vec<u8>);

impl TarBuilder {
    pub fn file(mut self, name: &str, content: &[u8]) -> TarBuilder {
        self.0.extend_from_slice(&header(name, b'0', content.len() as u64, ""));
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    pub fn folder(mut self, name: &str) -> TarBuilder {
        self.0.extend_from_slice(&header(&format!("{name}/"), b'5', 0, ""));
        self
    }

    pub fn link(mut self, name: &str, target: &str) -> TarBuilder {
        self.0.extend_from_slice(&header(name, b'2', 0, target));
        self
    }

    pub fn ended(mut self) -> TarBuilder {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self
    }
}

/// `tarCreateHeader`, word for word where it counts.
fn header(name: &str, kind: u8, size: u64, target: &str) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    number(&mut bytes[100..108], if kind == b'5' { 0o700 } else { 0o600 });
    number(&mut bytes[124..136], size);
    number(&mut bytes[136..148], 0o15_000_000_000);
    bytes[156] = kind;
    bytes[157..157 + target.len()].copy_from_slice(target.as_bytes());
    bytes[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut bytes);
    bytes
}

fn seal(bytes: &mut [u8; BLOCK]) {
    bytes[148..156].fill(b' ');
    let sum: u64 = bytes.iter().map(|byte| u64::from(*byte)).sum();
    number(&mut bytes[148..156], sum);
}

/// `print_tar_number`
fn number(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    if value < 1 << (digits * 3) {
        field.copy_from_slice(format!("{value:0digits$o} ").as_bytes());
    } else {
        field.fill(0);
        field[0] = 0x80;
        let at = field.len() - 8;
        field[at..].copy_from_slice(&value.to_be_bytes());
    }
}

/// Entries, each with its content; `end` too.
fn read(bytes: &[u8], cuts: &[usize]) -> Result<Vec<(Entry, Vec<u8>)>, BadTar> {
    let (mut tar, mut found) = (Tar::new(), Vec::new());
    let mut rest = Bytes::copy_from_slice(bytes);
    let mut cuts = cuts.iter().cycle();
    let mut open = None;
    while !rest.is_empty() {
        let cut = cuts.next().map_or(rest.len(), |cut| rest.len().min(*cut));
        let mut input = rest.split_to(cut);
        while let Some(event) = tar.next(&mut input)? {
            match event {
                TarEvent::Entry(entry) => {
                    assert!(open.is_none(), "the file before has ended");
                    match entry.kind {
                        EntryKind::File { .. } => open = Some((entry, Vec::new())),
                        _ => found.push((entry, Vec::new())),
                    }
                }
                TarEvent::Data(data) => open.as_mut().unwrap().1.extend_from_slice(&data),
                TarEvent::FileEnd => found.push(open.take().unwrap()),
            }
        }
        assert!(input.is_empty());
    }
    tar.end()?;
    assert!(open.is_none());
    Ok(found)
}

fn contents() -> impl Strategy<Value = Vec<(String, Option<Vec<u8>>)>> {
    let content = prop_oneof![
        Just(None),
        proptest::collection::vec(any::<u8>(), 0..1500).prop_map(Some),
        (0usize..5).prop_map(|blocks| Some(vec![7; blocks * BLOCK])),
    ];
    proptest::collection::vec(("[a-z_./]{1,95}[a-z]", content), 0..12)
}

proptest! {
    #[test]
    fn what_went_in_comes_out_however_it_is_cut(
        contents in contents(),
        cuts in proptest::collection::vec(1usize..3000, 1..5),
        ended: bool,
    ) {
        let mut tar = TarBuilder::default();
        for (name, content) in &contents {
            tar = match content {
                Some(content) => tar.file(name, content),
                None => tar.folder(name),
            };
        }
        let bytes = if ended { tar.ended() } else { tar }.0;
        let found = read(&bytes, &cuts).unwrap();
        let expected = contents.into_iter().map(|(name, content)| match content {
            Some(content) => {
                (Entry { name, mode: 0o600, kind: EntryKind::File { size: content.len() as u64 } }, content)
            }
            None => (Entry { name, mode: 0o700, kind: EntryKind::Folder }, Vec::new()),
        });
        prop_assert_eq!(found, expected.collect::<Vec<_>>());
    }

    #[test]
    fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..3000), cut in 1usize..700) {
        let _ = read(&bytes, &[cut]);
    }

    #[test]
    fn a_flipped_bit_in_a_header_is_found(at in 0usize..512, bit in 0u32..8) {
        let mut bytes = TarBuilder::default().file("base/5/1259", &[1; 700]).0;
        let before = bytes[at];
        bytes[at] ^= 1u8 << bit;
        // The sum's own blanks mean nothing, nor does a leading zero that becomes one.
        prop_assume!(!(154..156).contains(&at));
        prop_assume!((at, before, bytes[at]) != (148, b'0', b' '));
        prop_assert!(read(&bytes, &[]).is_err());
    }

    #[test]
    fn a_cut_archive_is_found(end in 1usize..2560) {
        let bytes = TarBuilder::default().file("a", &[1; 700]).file("b", &[2; 512]).0;
        let ends_between = end == BLOCK * 3;
        prop_assert_eq!(read(&bytes[..end], &[100]).is_ok(), ends_between);
    }
}

#[test]
fn links_and_long_names_are_read() {
    let tar = TarBuilder::default().link("pg_tblspc/16385", "/srv/fast");
    let found = read(&tar.0, &[]).unwrap();
    let target = "/srv/fast".to_string();
    assert_eq!(found[0].0.kind, EntryKind::Link { target });
    let mut long = header("16384", b'0', 0, "");
    long[345..349].copy_from_slice(b"base");
    seal(&mut long);
    assert_eq!(read(&long, &[]).unwrap()[0].0.name, "base/16384");
    let full = "x".repeat(100);
    assert_eq!(read(&header(&full, b'0', 0, ""), &[]).unwrap()[0].0.name, full);
}

#[test]
fn sizes_beyond_octal_are_read() {
    for size in [0, (8 << 30) - 1, 8 << 30, 1 << 45] {
        let mut input = Bytes::copy_from_slice(&header("base/5/1", b'0', size, ""));
        let event = Tar::new().next(&mut input).unwrap().unwrap();
        let TarEvent::Entry(entry) = event else { panic!("{event:?}") };
        assert_eq!(entry.kind, EntryKind::File { size });
    }
    let huge = read(&header("x", b'0', u64::MAX, ""), &[]);
    assert!(matches!(huge, Err(BadTar::Size { .. })), "{huge:?}");
}

#[test]
fn what_no_data_directory_has_is_refused() {
    let refused = |bytes: &[u8]| read(bytes, &[]).unwrap_err().to_string();
    assert!(refused(&header("tty", b'3', 0, "")).contains("of the kind '3'"));
    assert!(refused(&header("", b'0', 0, "")).contains("a name that is empty"));
    assert!(refused(&header("folder/", b'5', 9, "")).contains("a size of 9 bytes"));
    let mut wrong = header("x", b'0', 0, "");
    wrong[124..136].copy_from_slice(b"0000000009x ");
    seal(&mut wrong);
    assert!(refused(&wrong).contains("no number as its size"));
    let after = [TarBuilder::default().ended().0, header("x", b'0', 0, "").to_vec()].concat();
    assert!(refused(&after).contains("follows the end"));
}
