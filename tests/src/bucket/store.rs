//! The operations of S3, checksums verified before anything is published.

use super::Faults;
use super::objects::{Condition, Objects, Upload, etag, internal};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Crc32, Crc32c, Crc64Nvme, Md5, Sha1, Sha256};
use s3s::dto::*;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, TrailingHeaders, s3_error};
use std::sync::Arc;

/// No body may be longer.
const BODY_BYTES_MAX: usize = 256 << 20;
const KEYS_MAX: i32 = 1000;

#[derive(Debug)]
pub(super) struct Store {
    pub(super) objects: Arc<Objects>,
    pub(super) faults: Faults,
}

impl Store {
    fn condition(
        &self,
        if_match: Option<ETagCondition>,
        if_none_match: Option<ETagCondition>,
    ) -> Condition {
        match self.faults.conditions_ignored() {
            true => Condition::default(),
            false => Condition { if_match, if_none_match },
        }
    }
}

/// What a client says that a body's checksums are, in base64.
#[derive(Debug, Default)]
struct Claims {
    md5: Option<String>,
    crc32: Option<String>,
    crc32c: Option<String>,
    crc64nvme: Option<String>,
    sha1: Option<String>,
    sha256: Option<String>,
}

macro_rules! claims {
    ($input:expr) => {
        Claims {
            md5: $input.content_md5.clone(),
            crc32: $input.checksum_crc32.clone(),
            crc32c: $input.checksum_crc32c.clone(),
            crc64nvme: $input.checksum_crc64nvme.clone(),
            sha1: $input.checksum_sha1.clone(),
            sha256: $input.checksum_sha256.clone(),
        }
    };
}

impl Claims {
    /// Clients that stream send the checksum after the body.
    fn add_trailers(&mut self, trailers: Option<&TrailingHeaders>) {
        let Some(Some(trailers)) = trailers.map(TrailingHeaders::take) else { return };
        for (name, claim) in [
            ("x-amz-checksum-crc32", &mut self.crc32),
            ("x-amz-checksum-crc32c", &mut self.crc32c),
            ("x-amz-checksum-crc64nvme", &mut self.crc64nvme),
            ("x-amz-checksum-sha1", &mut self.sha1),
            ("x-amz-checksum-sha256", &mut self.sha256),
        ] {
            if let Some(value) = trailers.get(name).and_then(|value| value.to_str().ok()) {
                *claim = Some(value.to_string());
            }
        }
    }

    fn verify(&self, body: &[u8]) -> S3Result<()> {
        let mut hasher = ChecksumHasher {
            crc32: self.crc32.as_ref().map(|_| Crc32::new()),
            crc32c: self.crc32c.as_ref().map(|_| Crc32c::new()),
            crc64nvme: self.crc64nvme.as_ref().map(|_| Crc64Nvme::new()),
            sha1: self.sha1.as_ref().map(|_| Sha1::new()),
            sha256: self.sha256.as_ref().map(|_| Sha256::new()),
        };
        hasher.update(body);
        let found = hasher.finalize();
        let md5 = self.md5.as_ref().map(|_| BASE64_STANDARD.encode(Md5::checksum(body)));
        let holds = md5 == self.md5
            && found.checksum_crc32 == self.crc32
            && found.checksum_crc32c == self.crc32c
            && found.checksum_crc64nvme == self.crc64nvme
            && found.checksum_sha1 == self.sha1
            && found.checksum_sha256 == self.sha256;
        if holds { Ok(()) } else { Err(s3_error!(BadDigest)) }
    }
}

async fn receive(
    body: Option<StreamingBlob>,
    mut claims: Claims,
    trailers: Option<&TrailingHeaders>,
) -> S3Result<Bytes> {
    let mut bytes = BytesMut::new();
    if let Some(mut body) = body {
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|e| S3Error::with_source(S3ErrorCode::IncompleteBody, e))?;
            if bytes.len() + chunk.len() > BODY_BYTES_MAX {
                return Err(s3_error!(EntityTooLarge));
            }
            bytes.extend_from_slice(&chunk);
        }
    }
    claims.add_trailers(trailers);
    claims.verify(&bytes)?;
    Ok(bytes.freeze())
}

fn blob(bytes: Bytes) -> StreamingBlob {
    s3s::Body::from(bytes).into()
}

#[async_trait::async_trait]
impl S3 for Store {
    async fn put_object(
        &self,
        request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let mut input = request.input;
        let claims = claims!(input);
        let bytes = receive(input.body.take(), claims, request.trailing_headers.as_ref()).await?;
        let condition = self.condition(input.if_match, input.if_none_match);
        let etag = self.objects.put(&input.bucket, &input.key, bytes, &condition)?;
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(ETag::Strong(etag)),
            checksum_crc64nvme: input.checksum_crc64nvme,
            ..Default::default()
        }))
    }

    async fn get_object(
        &self,
        request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        let object = self.objects.look(&input.bucket, &input.key)?;
        if let Some(ETagCondition::ETag(wanted)) = &input.if_match
            && wanted.value() != object.etag
        {
            return Err(s3_error!(PreconditionFailed));
        }
        let range = input.range.map(|range| range.check(object.size)).transpose()?;
        let content_range = range
            .as_ref()
            .map(|range| format!("bytes {}-{}/{}", range.start, range.end - 1, object.size));
        let bytes = object.read(range.unwrap_or(0..object.size)).map_err(internal)?;
        Ok(S3Response::new(GetObjectOutput {
            content_length: Some(bytes.len() as i64),
            body: Some(blob(bytes)),
            content_range,
            accept_ranges: Some("bytes".to_string()),
            e_tag: Some(ETag::Strong(object.etag)),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        }))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let object = self.objects.look(&request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(object.size as i64),
            accept_ranges: Some("bytes".to_string()),
            e_tag: Some(ETag::Strong(object.etag)),
            last_modified: Some(object.modified.into()),
            version_id: self.faults.versions_told().then(|| "3HL4kqtJlcpXroDTDmJ".into()),
            ..Default::default()
        }))
    }

    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        self.objects.with(&request.input.bucket, |_| Ok(()))?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        let page = self.objects.with(&input.bucket, |held| Ok(Page::of(held, &input)))?;
        Ok(S3Response::new(ListObjectsV2Output {
            key_count: Some((page.objects.len() + page.prefixes.len()) as i32),
            contents: Some(page.objects),
            common_prefixes: Some(page.prefixes),
            is_truncated: Some(page.last.is_some()),
            next_continuation_token: page.last.map(|last| BASE64_STANDARD.encode(last)),
            name: Some(input.bucket),
            prefix: input.prefix,
            delimiter: input.delimiter,
            start_after: input.start_after,
            max_keys: input.max_keys,
            continuation_token: input.continuation_token,
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.objects.remove(&request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let input = request.input;
        let mut deleted = Vec::new();
        for object in input.delete.objects {
            self.objects.remove(&input.bucket, &object.key)?;
            deleted.push(DeletedObject { key: Some(object.key), ..Default::default() });
        }
        Ok(S3Response::new(DeleteObjectsOutput { deleted: Some(deleted), ..Default::default() }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = request.input;
        let id = format!("{}", backstay_common::id::ObjectId::random());
        self.objects.with(&input.bucket, |held| {
            let upload = Upload { key: input.key.clone(), ..Default::default() };
            held.uploads.insert(id.clone(), upload);
            Ok(())
        })?;
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..Default::default()
        }))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let mut input = request.input;
        let claims = claims!(input);
        let bytes = receive(input.body.take(), claims, request.trailing_headers.as_ref()).await?;
        let tag = etag(&bytes);
        self.objects.with(&input.bucket, |held| {
            let upload = held.uploads.get_mut(&input.upload_id);
            let upload = upload.ok_or_else(|| s3_error!(NoSuchUpload))?;
            upload.parts.insert(input.part_number, (tag.clone(), bytes));
            Ok(())
        })?;
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(ETag::Strong(tag)),
            checksum_crc64nvme: input.checksum_crc64nvme,
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = request.input;
        let listed = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let bytes = self.objects.with(&input.bucket, |held| {
            let upload = held.uploads.get(&input.upload_id);
            assemble(upload.filter(|upload| upload.key == input.key), &listed)
        })?;
        let condition = self.condition(input.if_match, input.if_none_match);
        let etag = self.objects.put(&input.bucket, &input.key, bytes, &condition)?;
        self.objects.with(&input.bucket, |held| Ok(held.uploads.remove(&input.upload_id)))?;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(ETag::Strong(etag)),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = request.input;
        let gone =
            self.objects.with(&input.bucket, |held| Ok(held.uploads.remove(&input.upload_id)))?;
        match gone {
            Some(_) => Ok(S3Response::new(AbortMultipartUploadOutput::default())),
            None => Err(s3_error!(NoSuchUpload)),
        }
    }
}

/// The parts that `listed` names, in its order, which must be theirs.
fn assemble(upload: Option<&Upload>, listed: &[CompletedPart]) -> S3Result<Bytes> {
    let upload = upload.ok_or_else(|| s3_error!(NoSuchUpload))?;
    if !listed.is_sorted_by_key(|part| part.part_number) || listed.is_empty() {
        return Err(s3_error!(InvalidPartOrder));
    }
    let mut whole = BytesMut::new();
    for part in listed {
        let found = part.part_number.and_then(|number| upload.parts.get(&number));
        let (etag, bytes) = found.ok_or_else(|| s3_error!(InvalidPart))?;
        if part.e_tag.as_ref().is_some_and(|wanted| wanted.value() != etag) {
            return Err(s3_error!(InvalidPart));
        }
        whole.extend_from_slice(bytes);
    }
    Ok(whole.freeze())
}

/// One page of a listing.
#[derive(Default)]
struct Page {
    objects: Vec<Object>,
    prefixes: Vec<CommonPrefix>,
    /// Where the next page begins, if there is one.
    last: Option<String>,
}

impl Page {
    fn of(held: &super::objects::Held, input: &ListObjectsV2Input) -> Page {
        let prefix = input.prefix.clone().unwrap_or_default();
        let delimiter = input.delimiter.clone().filter(|delimiter| !delimiter.is_empty());
        let after = match &input.continuation_token {
            Some(token) => {
                BASE64_STANDARD.decode(token).ok().and_then(|t| String::from_utf8(t).ok())
            }
            None => input.start_after.clone(),
        };
        let after = after.unwrap_or_default();
        let limit = input.max_keys.unwrap_or(KEYS_MAX).clamp(0, KEYS_MAX) as usize;
        let mut page = Page::default();
        let mut last = String::new();
        // Keys up to `after` were on earlier pages.
        let from = prefix.clone().max(after.clone());
        for (key, object) in held.objects.range(from..) {
            let Some(rest) = key.strip_prefix(&prefix) else { break };
            let folder = delimiter.as_ref().and_then(|delimiter| {
                rest.find(delimiter.as_str())
                    .map(|at| format!("{prefix}{}", &rest[..at + delimiter.len()]))
            });
            let shown = folder.as_ref().unwrap_or(key);
            if *shown <= after || *shown == last {
                continue;
            }
            if page.objects.len() + page.prefixes.len() == limit {
                page.last = Some(last);
                break;
            }
            last = shown.clone();
            match folder {
                Some(folder) => page.prefixes.push(CommonPrefix { prefix: Some(folder) }),
                None => page.objects.push(Object {
                    key: Some(key.clone()),
                    size: Some(object.size as i64),
                    e_tag: Some(ETag::Strong(object.etag.clone())),
                    last_modified: Some(object.modified.into()),
                    ..Default::default()
                }),
            }
        }
        page
    }
}
