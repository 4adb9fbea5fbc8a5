use super::*;
use crate::id::SystemId;
use proptest::prelude::*;

fn pack_name(id: ObjectId) -> ObjectName {
    ObjectName::Pack { system: SystemId::new(7), id }
}

fn draft(parts: &[&[u8]]) -> Draft {
    let mut packer = Packer::new(3).unwrap();
    Draft {
        kind: ObjectKind::Pack,
        plain: b"in the open".to_vec(),
        frames: parts.iter().map(|part| Frame::pack(&mut packer, part).unwrap()).collect(),
        meta: b"metadata".to_vec(),
    }
}

proptest! {
    #[test]
    fn what_is_sealed_opens(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3000), 0..6)) {
        let epoch = Epoch::generate();
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let sealed = seal(draft(&parts), &epoch, pack_name);
        let object = Object::open(sealed.bytes.clone(), &sealed.name, &epoch).unwrap();
        prop_assert_eq!(object.meta(), b"metadata");
        prop_assert_eq!(&object.header().plain()[..], b"in the open");
        prop_assert_eq!(object.spans(), &sealed.spans[..]);
        prop_assert_eq!(object.contents().unwrap(), parts.concat());
    }

    /// Any byte changed is found without a key; with the trailer made to fit, it is found with the key.
    #[test]
    fn any_change_is_found(at: usize, bit in 0..8) {
        let epoch = Epoch::generate();
        let sealed = seal(draft(&[&[7; 5000], b"second"]), &epoch, pack_name);
        let mut bytes = sealed.bytes.to_vec();
        let at = at % (bytes.len() - TRAILER_BYTES);
        bytes[at] ^= 1u8 << bit;
        prop_assert!(check_trailer(&bytes, "x").is_err());
        let body = bytes.len() - TRAILER_BYTES;
        let hash = blake3::hash(&bytes[..body]);
        bytes[body..].copy_from_slice(hash.as_bytes());
        let opened = Object::open(bytes.into(), &sealed.name, &epoch).and_then(|o| o.contents());
        prop_assert!(opened.is_err(), "a change of byte {} went unnoticed", at);
    }

    #[test]
    fn any_truncation_is_found(keep: usize) {
        let epoch = Epoch::generate();
        let sealed = seal(draft(&[&[7; 5000]]), &epoch, pack_name);
        let keep = keep % sealed.bytes.len();
        prop_assert!(check_trailer(&sealed.bytes[..keep], "x").is_err());
        prop_assert!(Object::open(sealed.bytes.slice(..keep), &sealed.name, &epoch).is_err());
    }
}

#[test]
fn sealing_twice_gives_two_names() {
    let epoch = Epoch::generate();
    let names = [0, 1].map(|_| seal(draft(&[b"same"]), &epoch, pack_name).name);
    assert_ne!(names[0], names[1]);
}

#[test]
fn swapped_objects_are_refused_by_name() {
    let epoch = Epoch::generate();
    let [a, b] = [b"a", b"b"].map(|part| seal(draft(&[part]), &epoch, pack_name));
    let error = Object::open(b.bytes, &a.name, &epoch).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.message().contains(&b.name.to_string()), "{error}");
}

#[test]
fn frames_do_not_open_elsewhere() {
    let epoch = Epoch::generate();
    let sealed = seal(draft(&[b"first", b"other"]), &epoch, pack_name);
    let opener = Opener::new(&sealed.header, &epoch).unwrap();
    let [first, other] = [sealed.spans[0], sealed.spans[1]];
    let mut unpacker = Unpacker::new();
    assert_eq!(
        opener.frame(&first, &sealed.bytes[first.range()], &mut unpacker).unwrap(),
        b"first"
    );
    assert!(opener.frame(&first, &sealed.bytes[other.range()], &mut unpacker).is_err());
}

#[test]
fn a_wrong_epoch_is_told_from_damage() {
    let sealed = seal(draft(&[b"x"]), &Epoch::generate(), pack_name);
    let error = Object::open(sealed.bytes, &sealed.name, &Epoch::generate()).unwrap_err();
    assert!(error.message().contains("not sealed under epoch"), "{error}");
}

#[test]
fn a_frame_that_claims_too_much_is_not_unpacked() {
    let frame = Frame::pack(&mut Packer::new(1).unwrap(), &[0; FRAME_BYTES_MAX]).unwrap();
    let mut span = frame.span(0, 0);
    let mut unpacker = Unpacker::new();
    let mut unpack =
        |span: FrameSpan| unpacker.unpack(&span, &frame.bytes, |_| true).map(<[u8]>::len);
    assert_eq!(unpack(span), Ok(FRAME_BYTES_MAX));
    span.plain_bytes -= 1;
    assert!(unpack(span).is_err());
    span.plain_bytes = u32::MAX;
    assert!(unpack(span).is_err());
    span.plain_bytes = FRAME_BYTES_MAX as u32;
    assert_eq!(unpack(span), Ok(FRAME_BYTES_MAX), "its buffers survive a bad frame");
}

#[test]
fn a_manifests_entry_rebuilds_the_header() {
    let epoch = Epoch::generate();
    let sealed = seal(Draft { plain: Vec::new(), ..draft(&[b"x"]) }, &epoch, pack_name);
    let header = &sealed.header;
    let again =
        Header::rebuild(sealed.name.clone(), epoch.id(), *header.salt(), *header.commitment());
    assert_eq!(&again, header);
    assert_eq!(Header::check(&sealed.bytes, &sealed.name).unwrap(), *header);
}

/// What anybody can do who may write to a store: other bytes, and a trailer that fits them.
fn with_trailer(mut bytes: Vec<u8>) -> Bytes {
    let body = bytes.len() - TRAILER_BYTES;
    let hash = blake3::hash(&bytes[..body]);
    bytes[body..].copy_from_slice(hash.as_bytes());
    bytes.into()
}

#[test]
fn a_sealed_kind_does_not_pass_as_plain() {
    let sealed = seal(draft(&[b"x"]), &Epoch::generate(), pack_name);
    let mut bytes = sealed.bytes.to_vec();
    bytes[10] = Suite::Plain as u8;
    let error = Header::check(&with_trailer(bytes), &sealed.name).unwrap_err();
    assert!(error.message().contains("never stored in suite 0"), "{error}");
}

#[test]
fn a_name_has_the_id_of_its_salt() {
    let (epoch, other) = (Epoch::generate(), pack_name(ObjectId::from_bytes([9; 8])));
    let sealed = seal(draft(&[b"x"]), &epoch, |_| other.clone());
    let error = Object::open(sealed.bytes, &other, &epoch).unwrap_err();
    assert!(error.message().contains("salt"), "{error}");
}

#[test]
fn nothing_hides_behind_a_plain_section() {
    let name = |_| ObjectName::Cluster;
    let object = plain_object(ObjectKind::Cluster, b"in the open".to_vec(), name);
    assert!(Header::check(&object.bytes, &object.name).is_ok());
    let end = object.header.len();
    let bytes = [&object.bytes[..end], b"hidden", &object.bytes[end..]].concat();
    assert!(Header::check(&with_trailer(bytes), &object.name).is_err());
    let mut bytes = object.bytes.to_vec();
    bytes[end] = 1;
    assert!(Header::check(&with_trailer(bytes), &object.name).is_err());
}

#[test]
fn contents_that_would_fill_the_memory_are_refused() {
    let epoch = Epoch::generate();
    let frame = Frame::pack(&mut Packer::new(1).unwrap(), &[0; FRAME_BYTES_MAX]).unwrap();
    let draft = Draft { frames: vec![frame; 65], ..draft(&[]) };
    let sealed = seal(draft, &epoch, pack_name);
    let object = Object::open(sealed.bytes, &sealed.name, &epoch).unwrap();
    assert_eq!(object.contents().unwrap_err().kind(), Kind::Corrupt);
}
