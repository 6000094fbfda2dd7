# What root of a sandbox can do to the files that it was given; one deed per line.
use strict;
use Socket;

$| = 1;
my ($none, $ours, $other) = ("none", "/run/runner", "/tmp/other");
mkdir $other;
sub did { print "did: @_\n" }
sub written {
    my ($how, $path) = @_;
    open(my $file, $how, $path) or return 0;
    return syswrite($file, "x");
}
did("remount") if syscall(165, $none, $ours, $none, 4096 | 32, 0) == 0;
did("bind") if syscall(165, $ours, $other, $none, 4096 | 16384, 0) == 0;
did("remount other") if syscall(165, $none, $other, $none, 4096 | 32, 0) == 0;

for my $place ($ours, "$ours/door", "$ours/config", $other, "$other/door") {
    did("make", $place) if written(">", "$place/made");
    did("mkdir", $place) if mkdir "$place/directory";
    did("symlink", $place) if symlink "/etc/shadow", "$place/symlink";
    did("link", $place) if link "$ours/init", "$place/link";
    # Of these the sandbox's kernel makes its own, which the host never sees.
    socket(my $socket, AF_UNIX, SOCK_STREAM, 0);
    bind($socket, pack_sockaddr_un("$place/own.sock"));
    my $fifo = "$place/fifo";
    syscall(133, $fifo, 0010666, 0);
}
for my $file (map { ("$_/plan", "$_/init", "$_/config/auth.json", "$_/door/context.tar") }
    $ours, $other) {
    did("write", $file) if written("+<", $file);
    did("truncate", $file) if truncate $file, 0;
    did("rename", $file) if rename $file, "$file.moved";
    did("unlink", $file) if unlink $file;
    chmod 0777, $file;
    chown 7, 7, $file;
}
did("replace the door") if unlink "$ours/door/gateway.sock" or rename $ours, "/run/moved";
for my $file (glob "/etc/host* /etc/resolv.conf") {
    syscall(165, $none, $file, $none, 4096 | 32, 0);
    did("write", $file) if written(">>", $file);
}
print "\nready\n";
sleep 1;
