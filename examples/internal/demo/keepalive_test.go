package demo

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// People copy the examples. Without keepalive a client does not notice for up to 15 minutes that a connection died
// without a sign, as when a NAT forgot it.
func TestEveryClientOfAnExampleSetsKeepalive(t *testing.T) {
	want := map[string]string{
		"DialKeepAliveTime":    "10 * time.Second",
		"DialKeepAliveTimeout": "2 * time.Second",
	}
	configs := 0
	err := filepath.WalkDir("../..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(node ast.Node) bool {
			literal, ok := node.(*ast.CompositeLit)
			if !ok || types.ExprString(literal.Type) != "clientv3.Config" {
				return true
			}
			configs++
			set := make(map[string]string)
			for _, element := range literal.Elts {
				if field, ok := element.(*ast.KeyValueExpr); ok {
					set[types.ExprString(field.Key)] = types.ExprString(field.Value)
				}
			}
			for field, value := range want {
				if set[field] != value {
					t.Errorf("%s: %s is %q, want %s", files.Position(literal.Pos()), field, set[field], value)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if configs == 0 {
		t.Error("no example makes a client: the test looks in the wrong place")
	}
}
