//! Prints where the protoc is that the client's build may use.

fn main() {
    let path = protoc_bin_vendored::protoc_bin_path().expect("a protoc for this platform");
    println!("{}", path.display());
}
